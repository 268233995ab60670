"""`longlens train`: masked language modelling on proteins, with any method that has gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from longlens.cli.options import choose_threads, threads_option


@click.command()
@click.argument("fasta", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the run.")
@click.option(
    "--held-out",
    required=True,
    type=click.Path(path_type=Path),
    help="FASTA file of proteins that are held out for validation.",
)
@click.option("--layers", default=6, show_default=True)
@click.option("--width", default=256, show_default=True)
@click.option("--heads", default=8, show_default=True)
@click.option("--steps", default=2000, show_default=True)
@click.option("--tokens", default=16_384, show_default=True, help="Tokens in a step.")
@click.option("--crop", default=2048, show_default=True, help="Longest crop, in tokens.")
@click.option("--joined", is_flag=True, help="Cut crops from concatenated proteins; attend across their borders.")
@click.option(
    "--mask-rate", default=0.15, show_default=True, help="Share of the residues that are masked and predicted."
)
@click.option("--method", default="exact", show_default=True, help="Method of attention; see `longlens methods`.")
@click.option("--rate", default=0.02, show_default=True, help="Learning rate of the layers' matrices (Muon).")
@click.option("--adam-rate", default=0.003, show_default=True, help="Learning rate of everything else (AdamW).")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--every", default=100, type=click.IntRange(min=1), show_default=True, help="Steps between checkpoints.")
@click.option("--weights", type=click.Choice(["float32", "float16"]), default="float32", show_default=True,
              help="Dtype of the weights in model/.")  # fmt: skip
@click.option(
    "--minutes",
    default=0.0,
    type=click.FloatRange(min=0),
    help="Stop after this many minutes; the same command continues. 0: do not stop.",
)
@threads_option
def train(
    fasta: tuple[Path, ...],
    output: Path,
    held_out: Path,
    every: int,
    weights: str,
    minutes: float,
    threads: int | None,
    **options: object,
) -> None:
    """Train a model of ESM-2's architecture on FASTA files, on the CPU.

    The folder holds checkpoint.pt, log.jsonl and, at the end, model/ in transformers' format. If a run was interrupted,
    the same command continues it, with the same result as without the interruption. A command with more --steps
    continues from the step at which the learning rate began to fall (stable.pt).
    """
    import time

    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TextColumn, TimeRemainingColumn

    from longlens.io.alphabet import ESM
    from longlens.io.results import writing
    from longlens.jobs.baselines import count_perplexities
    from longlens.jobs.limits import threads_set
    from longlens.jobs.runner import interruptible
    from longlens.models.pretrained import DTYPES, save
    from longlens.training.data import encode_files
    from longlens.training.loop import TrainingReport, TrainSettings
    from longlens.training.loop import train as run

    settings = TrainSettings(**options)  # type: ignore[arg-type]
    proteins, held_out_proteins = encode_files(fasta, ESM), encode_files([held_out], ESM)
    console = Console(file=sys.stderr)
    baselines = count_perplexities(proteins, held_out_proteins, ESM)
    console.print(
        f"{len(proteins)} proteins, {sum(map(len, proteins))} tokens; {len(held_out_proteins)} held out; "
        f"perplexity by counting: unigram {baselines['unigram']:.2f}, bigram {baselines['bigram']:.2f}"
    )
    started = time.monotonic()
    columns = [*Bar.get_default_columns()[:-1], TimeRemainingColumn(), TextColumn("{task.fields[status]}")]
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=settings.steps, status="")

        def report(now: TrainingReport) -> None:
            status = f"loss {now.loss:.4f}, {now.rate:.0f} residues/s"
            if now.held_out is not None:
                console.print(f"step {now.step}: {status}, held-out perplexity {now.held_out:.3f}")
            bar.update(task, completed=now.step, status=status)

        with interruptible(lambda: f"the last checkpoint in {output} stays"), threads_set(choose_threads(threads)):
            model, reached = run(
                settings,
                proteins,
                held_out_proteins,
                output,
                report,
                every=every,
                note=console.print,
                stop=lambda: minutes > 0 and time.monotonic() - started > 60 * minutes,
            )
    if reached < settings.steps:
        click.echo(f"stopped at step {reached:,} of {settings.steps:,}; the same command continues")
        return
    with writing(output, "the last checkpoint stays"):
        save(model, output / "model", DTYPES[weights])
    click.echo(f"model in {output / 'model'}")
