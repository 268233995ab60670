"""`longlens plan`: the memory and time that embedding a file would take."""

from __future__ import annotations

import click

from longlens.cli.options import (
    WordsCommand,
    as_paths,
    choose_threads,
    include_option,
    layers_option,
    max_memory_option,
    model_options,
    on_error_option,
    surprise_option,
    tokens_per_batch_option,
)

# the job does not fit into the allowed memory; 2 means wrong input, as for all commands
DOES_NOT_FIT = 1


@click.command(cls=WordsCommand)
@click.argument("fasta", nargs=-1, required=True)
@include_option
@layers_option
@surprise_option
@max_memory_option
@tokens_per_batch_option
@on_error_option
@model_options
def plan(
    fasta: tuple[str, ...],
    include: tuple[str, ...],
    layers: tuple[int | str, ...],
    surprise: str,
    max_memory: str | None,
    tokens_per_batch: str,
    on_error: str,
    model: str,
    dtype: str,
    device: str,
    threads: int | None,
) -> int:
    """Predict the memory and time of embedding FASTA files with exact attention, and the memory of N x N weights.

    Memory is the peak of the whole process, including PyTorch and the weights. No weights are read and no proteins are
    run; time is estimated from a layer of random weights that is timed now. Exit status: 0 if the job fits into the
    allowed memory, 1 if it does not, 2 wrong input.
    """
    from rich.console import Console
    from rich.table import Table

    from longlens.jobs.embed_plan import plan_embedding
    from longlens.jobs.inputs import open_proteins
    from longlens.jobs.limits import chains_of, threads_set
    from longlens.jobs.memory import model_size
    from longlens.jobs.plan import measure_rate
    from longlens.ops.explain import format_bytes

    with open_proteins(as_paths(fasta), on_error=on_error, chains=chains_of(model)) as source:
        proteins = source.survey
    size = model_size(model, dtype, device)
    planned = plan_embedding(
        size, proteins, include=include, layers=layers, masked=surprise == "masked", max_memory=max_memory,
        tokens_per_batch=tokens_per_batch,
    )  # fmt: skip
    lengths = [entry.length for entry in proteins.entries]
    longest = proteins.longest
    with threads_set(choose_threads(threads)):
        seconds = planned.operations / measure_rate(size.config, size.dtype, size.device)
    peak = planned.peak
    transient = max((peak.batch, "the largest batch"), (peak.loading, "loading"), (peak.writing, "writing the results"))
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    for name, text in (
        ("proteins", f"{len(lengths):,}, {sum(lengths):,} residues, longest {longest.length:,} ({longest.id})"),
        ("batches", f"{planned.batches:,} of up to {planned.budget:,} tokens, the largest {planned.largest:,}"),
        ("weights", format_bytes(peak.weights)),
        ("peak", f"about {format_bytes(peak.total)} for the whole process: libraries {format_bytes(peak.libraries)}, "
                 f"weights, {transient[1]} {format_bytes(transient[0])}"),
        ("allowed", format_bytes(planned.limit)),
        ("time", f"about {_duration(seconds)} on this machine ({size.device.type}, {str(size.dtype)[6:]}), estimated "
                 "from one layer; without start and loading"),
        ("N x N weights", f"{format_bytes(planned.standard)} for one layer's attention of the longest protein, "
                      f"{format_bytes(planned.standard * size.config.layers)} for all layers"),
        ("fits", f"no: {planned.refusal}" if planned.refusal else "yes"),
    ):  # fmt: skip
        table.add_row(name, text)
    Console(width=120).print(table)
    for warning in proteins.warnings:
        click.echo(f"longlens: warning: {warning}", err=True)
    if proteins.skipped:
        click.echo(f"{len(proteins.skipped)} records cannot be read; the first: {proteins.skipped[0].reason}", err=True)
    return DOES_NOT_FIT if planned.refusal else 0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
