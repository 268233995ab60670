"""`longlens plan`: what embedding a file would take, before it is done."""

from __future__ import annotations

import click

from longlens.cli.options import WordsCommand, model_options


@click.command(cls=WordsCommand)
@click.argument("fasta", nargs=-1, required=True)
@click.option("--max-memory", default=None, help="Such as 16G. [default: 80 % of what is free]")
@click.option("--tokens-per-batch", "--toks-per-batch", default="auto", show_default=True)
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True)
@model_options
def plan(
    fasta: tuple[str, ...],
    max_memory: str | None,
    tokens_per_batch: str,
    on_error: str,
    model: str,
    dtype: str,
    device: str,
    threads: int | None,
) -> None:
    """Say how much memory and time embedding FASTA files would take, and what the N x N way would.

    For `--include mean` and exact attention.
    Time is an estimate from the rate of a short pass measured now.
    """
    from rich.console import Console
    from rich.table import Table

    from longlens.errors import InputError
    from longlens.io.survey import survey
    from longlens.jobs.embed import refuse_too_long
    from longlens.jobs.inputs import readable_twice
    from longlens.jobs.limits import memory_limits, threads_set
    from longlens.jobs.plan import Outputs, batch_bytes, make_batches, measure_rate, operations, standard_bytes
    from longlens.models.pretrained import load
    from longlens.ops.explain import format_bytes

    with readable_twice(fasta) as paths:
        found = survey(paths, skip_errors=on_error == "skip")
    loaded = load(model, dtype=dtype, device=device)
    outputs = Outputs(0, 1)
    limit, budget = memory_limits(loaded, outputs, max_memory, tokens_per_batch)
    lengths = [entry.length for entry in found.entries]
    batches = list(make_batches(lengths, budget))
    largest = max(sum(lengths[a:b]) + 2 * (b - a) for a, b in batches)
    element = loaded.dtype.itemsize
    weights = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    peak = batch_bytes(loaded.config, largest, element, outputs)
    with threads_set(threads):
        seconds = operations(loaded.config, lengths) / measure_rate(loaded)
    longest = max(found.entries, key=lambda entry: entry.length)
    standard = standard_bytes(loaded.config, longest.length + 2, element)
    fits = "yes" if peak <= limit else "no: raise --max-memory, use --dtype bfloat16 or a smaller model"
    try:
        refuse_too_long(loaded, found, outputs, limit)
    except InputError as error:
        fits = f"no: {error}"
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    for name, said in (
        ("proteins", f"{len(lengths):,}, {sum(lengths):,} residues, longest {longest.length:,} ({longest.id})"),
        ("batches", f"{len(batches):,} of up to {budget:,} tokens, the largest {largest:,}"),
        ("weights", format_bytes(weights)),
        ("peak", f"{format_bytes(peak)} beyond the weights; {format_bytes(limit)} are allowed"),
        ("time", f"about {_duration(seconds)} on this machine ({loaded.device.type}, {str(loaded.dtype)[6:]})"),
        ("N x N way", f"{format_bytes(standard)} for one layer's attention of the longest protein, "
                      f"{format_bytes(standard * loaded.config.layers)} for all layers"),
        ("fits", fits),
    ):  # fmt: skip
        table.add_row(name, said)
    Console(width=120).print(table)
    if found.skipped:
        click.echo(f"{len(found.skipped)} records cannot be read; the first: {found.skipped[0].reason}", err=True)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
