"""`longlens plan`: what embedding a file would take, before it is done."""

from __future__ import annotations

import click

from longlens.cli.options import WordsCommand, model_options, readable_input

# the job does not fit into the memory that is allowed; 2 is wrong input, as everywhere
DOES_NOT_FIT = 1


@click.command(cls=WordsCommand)
@click.argument("fasta", nargs=-1, required=True)
@click.option("--include", multiple=True, default=["mean"], metavar="WHAT...", show_default=True,
              type=click.Choice(["mean", "per-tok", "bos", "logits", "surprise"]),
              help="What to compute: mean, per-tok, bos, logits, surprise.")  # fmt: skip
@click.option("--surprise", type=click.Choice(["wt", "masked"]), default="wt", show_default=True,
              help="wt: one pass; masked: every residue hidden in turn.")  # fmt: skip
@click.option("--max-memory", default=None, help="Of the whole process, such as 16G. [default: 80 % of what is free]")
@click.option("--tokens-per-batch", "--toks-per-batch", default="auto", show_default=True)
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True)
@model_options
def plan(
    fasta: tuple[str, ...],
    include: tuple[str, ...],
    surprise: str,
    max_memory: str | None,
    tokens_per_batch: str,
    on_error: str,
    model: str,
    dtype: str,
    device: str,
) -> int:
    """Say how much memory and time embedding FASTA files would take with exact attention, and what N x N weights would.

    Memory is that of the whole process at its peak, PyTorch and the weights among it. Neither are weights read nor
    proteins run; time is an estimate from a layer of random weights that is timed now. Exit: 0 it fits, 1 it does not
    fit into the memory allowed, 2 wrong input.
    """
    from rich.console import Console
    from rich.table import Table

    from longlens.errors import InputError
    from longlens.io.survey import survey
    from longlens.jobs.embed_plan import plan_embedding
    from longlens.jobs.memory import model_size
    from longlens.jobs.plan import measure_rate
    from longlens.ops.explain import format_bytes

    masked = surprise == "masked"
    if masked and "surprise" not in include:
        raise InputError("expected --include surprise with --surprise masked, which does nothing without it")
    with readable_input(fasta) as paths:
        proteins = survey(paths, skip_errors=on_error == "skip")
    size = model_size(model, dtype, device)
    planned = plan_embedding(
        size, proteins, include=include, masked=masked, max_memory=max_memory, tokens_per_batch=tokens_per_batch
    )
    lengths = [entry.length for entry in proteins.entries]
    longest = max(proteins.entries, key=lambda entry: entry.length)
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
        ("N x N way", f"{format_bytes(planned.standard)} for one layer's attention of the longest protein, "
                      f"{format_bytes(planned.standard * size.config.layers)} for all layers"),
        ("fits", f"no: {planned.refusal}" if planned.refusal else "yes"),
    ):  # fmt: skip
        table.add_row(name, text)
    Console(width=120).print(table)
    if proteins.skipped:
        click.echo(f"{len(proteins.skipped)} records cannot be read; the first: {proteins.skipped[0].reason}", err=True)
    return DOES_NOT_FIT if planned.refusal else 0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
