"""`longlens predict`: apply a fine-tuned model to proteins."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from longlens.cli.options import as_paths, choose_threads, max_memory_option, threads_option
from longlens.cli.progress import shown_progress


@click.command()
@click.argument("fasta", nargs=-1, required=True)
@click.option("-m", "--model", required=True, type=click.Path(path_type=Path), help="Folder that `finetune` made.")
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="File to write: .csv, .tsv or .parquet. [default: CSV on standard output]")  # fmt: skip
@click.option("--base", default=None, help="The model that was fine-tuned, if it is no longer where it was.")
@max_memory_option
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True)  # fmt: skip
@click.option("--device", default="auto", show_default=True)
@threads_option
def predict(
    fasta: tuple[str, ...],
    model: Path,
    output: Path | None,
    base: str | None,
    max_memory: str | None,
    dtype: str,
    device: str,
    threads: int | None,
) -> None:
    """Predict the property that `longlens finetune` learned, for the proteins of FASTA files ("-" is standard input).

    A row for each protein, or for each residue: the predicted class or value, and the probability of each class. An
    interrupted run continues when the same command is given again.
    """
    from longlens.jobs.predict import predict as run_predict

    with shown_progress() as progress:
        predictions = run_predict(
            as_paths(fasta), model=model, output=output, base=base, max_memory=max_memory, dtype=dtype, device=device,
            threads=choose_threads(threads), progress=progress,
        )  # fmt: skip
    if output is None:
        sys.stdout.write(predictions.data.decode())
    else:
        click.echo(f"{len(predictions):,} predictions in {output}")
