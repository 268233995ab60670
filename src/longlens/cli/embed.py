"""`longlens embed`: proteins to vectors, logits and surprise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from longlens.cli.options import (
    WordsCommand,
    as_paths,
    choose_threads,
    include_option,
    layers_option,
    max_memory_option,
    method_option,
    model_options,
    on_error_option,
    reading_options,
    surprise_option,
    tokens_per_batch_option,
    warn_of_default_model,
)
from longlens.cli.progress import shown_progress

if TYPE_CHECKING:
    from longlens.jobs.embeddings import Embeddings


@click.command(cls=WordsCommand)
@click.argument("fasta", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@include_option
@layers_option
@click.option(
    "--format", "format_", type=click.Choice(["h5", "h5-by-id", "scikit-bio", "zarr", "pt", "npz", "parquet"]),
    default="h5", show_default=True,
)  # fmt: skip
@surprise_option
@click.option("--array-dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@tokens_per_batch_option
@max_memory_option
@on_error_option
@model_options
@method_option
@reading_options
def embed(
    fasta: tuple[str, ...],
    output: Path,
    include: tuple[str, ...],
    layers: tuple[int | str, ...],
    format_: str,
    surprise: str,
    array_dtype: str,
    tokens_per_batch: str,
    max_memory: str | None,
    on_error: str,
    model: str,
    dtype: str,
    device: str,
    threads: int | None,
    method: str,
    structures: tuple[Path, ...],
    min_plddt: float | None,
    rare_as_x: bool,
) -> int:
    """Compute vectors, logits and surprise of the proteins in FASTA files ("-" is standard input), plain or compressed.

    OUTPUT receives index.parquet (a row for each record) and the arrays in the chosen format. An interrupted run
    continues when the same command is given again, with the same bytes as result. Exit status: 0 done, 2 wrong input,
    3 done except for skipped records, 130 interrupted.
    """
    from longlens.jobs.embed import embed as run_embed
    from longlens.jobs.runner import SKIPPED

    warn_of_default_model()
    with shown_progress() as progress:
        embeddings = run_embed(
            as_paths(fasta), model=model, output=output, include=include, layers=layers, surprise=surprise,
            format=format_, array_dtype=array_dtype, method=method, tokens_per_batch=tokens_per_batch,
            max_memory=max_memory, on_error=on_error, dtype=dtype, device=device, threads=choose_threads(threads),
            structures=structures or None, min_plddt=min_plddt, rare_as_x=rare_as_x, progress=progress,
        )  # fmt: skip
    _summary(embeddings, masked=surprise == "masked")
    return SKIPPED if embeddings.skipped else 0


def _summary(embeddings: Embeddings, *, masked: bool) -> None:
    """Print a summary on standard output."""
    from rich.console import Console
    from rich.table import Table

    rows = [row for row in embeddings.table if row["problem"] is None]
    shown = Table("", "", show_header=False, box=None, pad_edge=False)
    lengths = [row["length"] for row in rows]
    shown.add_row("model", embeddings.model)
    shown.add_row("proteins", f"{len(lengths):,}")
    shown.add_row("residues", f"{sum(lengths):,} (longest {max(lengths):,})")
    replaced, gaps = (sum(row[name] for row in rows) for name in ("substituted", "gaps"))
    if replaced:
        shown.add_row("read as X", f"{replaced:,} residues (J and inner *)")
    if gaps:
        shown.add_row("left out", f"{gaps:,} gaps")
    if embeddings.skipped:
        shown.add_row("skipped", f"{len(embeddings.skipped):,} records: see `problem` in the table")
    values = sorted(row["perplexity"] for row in rows if "perplexity" in row)
    if values:
        seen = "each residue hidden in turn" if masked else "one pass, in which each residue is seen"
        shown.add_row("perplexity", f"median {values[len(values) // 2]:.2f} ({seen})")
    Console(width=120).print(shown)
    for name in ("index.parquet", *sorted({row["file"] for row in rows})):
        click.echo(f"results     {embeddings.folder / name}")
