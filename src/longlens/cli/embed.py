"""`longlens embed`: proteins to vectors, logits and surprise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longlens.cli.options import WordsCommand, load_model, memory_limits, method_option, model_options, readable_input

if TYPE_CHECKING:
    from longlens.io.survey import Survey
    from longlens.jobs.embed import Step

# finished, but records were skipped
SKIPPED = 3


@click.command(cls=WordsCommand)
@click.argument("fasta", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@click.option(
    "--include",
    multiple=True,
    default=["mean"],
    metavar="WHAT...",
    type=click.Choice(["mean", "per-tok", "bos", "logits", "surprise"]),
    show_default=True,
    help="What to compute: mean, per-tok, bos, logits, surprise.",
)
@click.option(
    "--layers",
    "--repr-layers",
    multiple=True,
    type=int,
    default=[-1],
    metavar="N...",
    show_default=True,
    help="Layers; 0 is the embedding, -1 the last.",
)
@click.option(
    "--format", "format_", type=click.Choice(["h5", "zarr", "pt", "npz", "parquet"]), default="h5", show_default=True
)
@click.option(
    "--surprise",
    type=click.Choice(["wt", "masked"]),
    default="wt",
    show_default=True,
    help="wt: one pass; masked: every residue hidden in turn.",
)
@click.option("--array-dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@click.option("--tokens-per-batch", "--toks-per-batch", default="auto", show_default=True)
@click.option("--max-memory", default=None, help="Such as 16G. [default: 80 % of what is free]")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do with a record that cannot be read.",
)
@model_options
@method_option
def embed(
    fasta: tuple[str, ...],
    output: Path,
    include: tuple[str, ...],
    layers: tuple[int, ...],
    format_: str,
    surprise: str,
    array_dtype: str,
    tokens_per_batch: str,
    max_memory: str | None,
    on_error: str,
    model: str,
    dtype: str,
    device: str,
    method: str,
) -> int:
    """Embed the proteins of FASTA files ("-" is standard input), plain or gzipped.

    OUTPUT gets index.parquet (a row for each record) and the arrays in the chosen format. Killed at any moment, the
    same command goes on where it stopped, to the same bytes. Exit: 0 done, 2 wrong input, 3 done but for skipped
    records.
    """
    from longlens.errors import InputError
    from longlens.io.results import ResultFolder
    from longlens.io.survey import survey
    from longlens.jobs import embed as job

    options = job.EmbedOptions(
        include=tuple(dict.fromkeys(include)), layers=layers, format=format_, surprise=surprise, method=method,
        array_dtype=array_dtype,
    )  # fmt: skip
    with readable_input(fasta) as paths:
        found = survey(paths, skip_errors=on_error == "skip")
        loaded = load_model(model, dtype, device, max_memory)
        limit, budget = memory_limits(loaded, job.outputs(loaded, options), max_memory, tokens_per_batch)
        job.refuse_too_long(loaded, found, options, limit)
        identity = job.identity(loaded, found, options)
        # a budget that was chosen by itself is taken over from the run that began; one that was named must be the same
        if tokens_per_batch != "auto":
            identity["tokens_per_batch"] = budget
        settled = {"tokens_per_batch": budget}
        with _progress(found) as report:
            try:
                with closing(ResultFolder(output, identity, job.array_specs(loaded, options), settled)) as folder:
                    kept = int(folder.settled["tokens_per_batch"])
                    if not folder.complete:
                        job.refuse_too_large(loaded, [entry.length for entry in found.entries], options, kept, limit)
                    job.embed(loaded, paths, found, options, folder, report)
            except OSError as error:
                raise InputError(
                    f"{output}: cannot be written ({error.strerror or error}); nothing is lost: once there is room, "
                    "the same command goes on"
                ) from error
    _summary(found, output, masked=surprise == "masked")
    return SKIPPED if found.skipped else 0


@contextmanager
def _progress(found: Survey) -> Iterator[Callable[[Step], None]]:
    """A bar with rate and remaining time on a terminal; nothing in a pipe."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    total = sum(entry.length for entry in found.entries)
    counted = TextColumn("{task.completed:,.0f} of {task.total:,.0f} residues")
    rate = TextColumn("{task.fields[rate]}")
    columns = [TextColumn("{task.description}"), BarColumn(), counted, rate, TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[bool, Any] = {}

        def report(step: Step) -> None:
            if step.masked not in tasks:
                kind = "masked" if step.masked else "embed"
                tasks[step.masked] = bar.add_task(kind, total=total, completed=step.done, rate="")
            task = bar.tasks[tasks[step.masked]]
            speed = f"{task.speed:,.0f}/s" if task.speed else ""
            bar.update(task.id, completed=step.done, rate=speed)

        yield report


def _summary(found: Survey, output: Path, *, masked: bool) -> None:
    """What was done, on standard output."""
    import pyarrow.parquet as pq
    from rich.console import Console
    from rich.table import Table

    table = pq.read_table(output / "index.parquet").to_pydict()
    shown = Table("", "", show_header=False, box=None, pad_edge=False)
    lengths = [entry.length for entry in found.entries]
    shown.add_row("proteins", f"{len(lengths):,}")
    shown.add_row("residues", f"{sum(lengths):,} (longest {max(lengths):,})")
    replaced = sum(entry.substituted for entry in found.entries)
    gaps = sum(entry.gaps for entry in found.entries)
    if replaced:
        shown.add_row("read as X", f"{replaced:,} residues (J and inner *)")
    if gaps:
        shown.add_row("left out", f"{gaps:,} gaps")
    if found.skipped:
        shown.add_row("skipped", f"{len(found.skipped):,} records: see `problem` in the table")
    values = [value for value in table.get("perplexity", []) if value is not None]
    if values:
        seen = "each residue hidden in turn" if masked else "each residue in the model's sight"
        shown.add_row("perplexity", f"median {sorted(values)[len(values) // 2]:.2f} ({seen})")
    Console(width=120).print(shown)
    files = {name for name in table["file"] if name}
    for name in ["index.parquet", *sorted(files)]:
        click.echo(f"results     {output / name}")
