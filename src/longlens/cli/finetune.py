"""`longlens finetune`: learn a property of proteins or of their residues from examples."""

from __future__ import annotations

from pathlib import Path

import click

from longlens.cli.options import choose_threads, max_memory_option, model_options, warn_of_default_model
from longlens.cli.progress import shown_progress


@click.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option(
    "--task",
    required=True,
    type=click.Choice(["sequence_to_class", "sequence_to_value", "residue_to_class", "residue_to_value"]),
    help="What is learned, by biotrainer's names.",
)
@click.option(
    "--method",
    type=click.Choice(["probe", "head", "lora"]),
    default="head",
    show_default=True,
    help="Up to which stage: a linear probe, a head on frozen vectors, low-rank adaptation of the model.",
)
@click.option("--labels", type=click.Path(path_type=Path), default=None, help="A second file: targets of residues.")
@click.option("--target-col", default="target", show_default=True, help="Column of the targets.")
@click.option(
    "--split",
    type=click.Choice(["auto", "given", "clusters", "random"]),
    default="auto",
    show_default=True,
    help="auto: SET of the file, or else clusters of similar proteins.",
)
@click.option("--clusters", type=click.Path(path_type=Path), default=None, help="MMseqs2's table of clusters.")
@click.option("--steps", default=400, show_default=True, help="Most steps of each stage.")
@click.option("--every", default=20, show_default=True, help="Steps between validations.")
@click.option("--patience", default=5, show_default=True, help="Validations without improvement before a stage ends.")
@click.option("--tokens", default=4096, show_default=True, help="Tokens in a step.")
@click.option("--head-rate", default=0.001, show_default=True, help="Learning rate of the head.")
@click.option("--rate", default=0.001, show_default=True, help="Learning rate of low-rank adaptation.")
@click.option("--rank", default=8, show_default=True, help="Rank of the adaptation.")
@click.option("--alpha", default=16.0, show_default=True, help="The adaptation is multiplied by alpha / rank.")
@click.option("--hidden", default=64, show_default=True, help="Width of the head's inner layer.")
@click.option("--weight-decay", default=0.01, show_default=True)
@click.option("--seed", default=0, show_default=True)
@max_memory_option
@model_options
def finetune(
    file: Path,
    output: Path,
    task: str,
    method: str,
    labels: Path | None,
    target_col: str,
    split: str,
    clusters: Path | None,
    max_memory: str | None,
    model: str,
    dtype: str,
    device: str,
    threads: int | None,
    **settings: object,
) -> None:
    """Learn a property from the proteins of FILE: FASTA with TARGET= and SET= in its headers, or a table (CSV, TSV,
    Parquet) with the columns id, sequence, target and, where wanted, set.

    A linear probe comes first and is always reported, beside simple baselines; all measures are those of held-out
    proteins. An interrupted run continues when the same command is given again. Needs the extra `fit`.
    """
    from longlens.finetuning.trainer import TuneSettings
    from longlens.jobs.finetune import finetune as run_finetune

    warn_of_default_model()
    with shown_progress() as progress:
        tuned = run_finetune(
            "-" if str(file) == "-" else file, task=task, output=output, model=model, method=method, labels=labels,
            target_col=target_col, split=split, clusters=clusters, settings=TuneSettings(**settings),  # type: ignore[arg-type]
            max_memory=max_memory, dtype=dtype, device=device, threads=choose_threads(threads), progress=progress,
        )  # fmt: skip
    click.echo(tuned.text, nl=False)
    click.echo(f"results     {output}")
