"""`longlens score`: zero-shot effects of variants, from a model's predictions."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import click

from longlens.cli.options import (
    WordsCommand,
    choose_threads,
    max_memory_option,
    method_option,
    reading_options,
    several_models_options,
    warn_of_default_model,
)
from longlens.cli.progress import shown_progress


@click.command(cls=WordsCommand)
@click.argument(
    "variants", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True)
)
@click.option("--fasta", type=click.Path(path_type=Path), help="The proteins.")
@click.option("--sequence", help="The protein as letters, instead of a file.")
@click.option(
    "--all", "everything", is_flag=True, help="Score all L x 20 substitutions of one protein, instead of a CSV."
)
@click.option("--proteingym", type=click.Path(path_type=Path), help="A folder of ProteinGym's assays, or one of them, "
              "instead of a CSV; -o is then a folder.")  # fmt: skip
@click.option("--reference", type=click.Path(path_type=Path), help="With --proteingym: its reference file. [default: "
              "DMS_substitutions.csv in or near the folder]")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="CSV file to write. [default: standard output]")
@click.option(
    "--scoring-strategy",
    type=click.Choice(["wt-marginals", "masked-marginals", "pseudo-ppl"]),
    default="masked-marginals",
    show_default=True,
)
@click.option("--mutation-col", default="mutant", show_default=True, help="Column of variants: A24G, A24G:T56S, "
              "p.Lys2Ala, WT.")  # fmt: skip
@click.option("--protein-col", default=None, help="Column of the protein's id, if the FASTA file has several proteins.")
@click.option("--offset-idx", default=1, show_default=True, help="Number of the first residue.")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do with a variant that cannot be scored; `skip` says why in the column `problem`.",
)
@click.option("--tokens-per-batch", "--toks-per-batch", default=16_384, show_default=True)
@click.option("--figure", is_flag=True, help="With --all: also draw the matrix, beside the CSV as .png.")
@max_memory_option
@several_models_options
@method_option
@reading_options
def score(
    variants: Path | None,
    fasta: Path | None,
    sequence: str | None,
    everything: bool,
    proteingym: Path | None,
    reference: Path | None,
    output: Path | None,
    scoring_strategy: str,
    mutation_col: str,
    protein_col: str | None,
    offset_idx: int,
    on_error: str,
    tokens_per_batch: int,
    figure: bool,
    max_memory: str | None,
    model: tuple[str, ...],
    dtype: str,
    device: str,
    threads: int | None,
    method: str,
    structures: tuple[Path, ...],
    min_plddt: float | None,
    rare_as_x: bool,
) -> int:
    """Score the variants of a CSV or TSV file, plain or compressed ("-" is standard input): the output has its columns
    and a column of scores, named after the model.

    A higher score means better tolerated. `--all` writes position, wild type, and a column for each of the 20 residues.
    `--proteingym` writes the assays' tables with a column for each model that was run, and their agreement with the
    measurements. Exit status: 0 done, 2 wrong input, 3 done except for skipped variants.
    """
    if reference is not None and proteingym is None:
        raise click.UsageError("expected --reference only with --proteingym")
    if proteingym is not None:
        if variants is not None or everything or figure or fasta is not None or sequence is not None or protein_col:
            raise click.UsageError("expected --proteingym without other variants, proteins and figures")
        if structures or min_plddt is not None or rare_as_x:
            raise click.UsageError("expected --proteingym without --structures, --min-plddt and --rare-as-x")
        _refuse_columns()
        if output is None:
            raise click.UsageError("expected a folder for the results of --proteingym: -o FOLDER")
        return max(_score_assays(
            proteingym, output=output, reference=reference, model=one, scoring_strategy=scoring_strategy,
            on_error=on_error, tokens_per_batch=tokens_per_batch, max_memory=max_memory, method=method, dtype=dtype,
            device=device, threads=choose_threads(threads),
        ) for one in model)  # fmt: skip
    if (variants is None) != everything:
        raise click.UsageError("expected either a CSV file of variants or --all")
    if (fasta is None) == (sequence is None):
        raise click.UsageError("expected the protein by either --fasta or --sequence")
    from longlens.jobs.runner import SKIPPED
    from longlens.jobs.score_job import score as run_score

    proteins: Any = fasta if fasta is None or str(fasta) != "-" else "-"
    table: Any = variants if variants is None or str(variants) != "-" else "-"
    warn_of_default_model()
    with shown_progress() as progress:
        scores = run_score(
            # a mapping, since a bare string could name a file
            {"": sequence} if sequence is not None else proteins, table, output=output,
            model=model[0] if len(model) == 1 else model,
            scoring_strategy=scoring_strategy, mutation_col=mutation_col, protein_col=protein_col,
            offset_idx=offset_idx, on_error=on_error, tokens_per_batch=tokens_per_batch, figure=figure,
            max_memory=max_memory, method=method, dtype=dtype, device=device,
            threads=choose_threads(threads), structures=structures or None, min_plddt=min_plddt, rare_as_x=rare_as_x,
            progress=progress,
        )  # fmt: skip
    if output is None:
        sys.stdout.write(scores.text)
    else:
        click.echo(f"results     {output}")
        if figure:
            click.echo(f"figure      {output.with_suffix('.png')}")
    if scores.skipped:
        click.echo(f"{scores.skipped:,} variants are not scored: see the column `problem`", err=True)
    return SKIPPED if scores.skipped else 0


def _refuse_columns() -> None:
    """Refuse options of other tables beside --proteingym, also where they were given their default."""
    source = click.get_current_context().get_parameter_source
    for name in ("mutation_col", "offset_idx"):
        if source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"expected --proteingym without --{name.replace('_', '-')}: its tables name variants in the column "
                "mutant, from 1"
            )


def _score_assays(assays: Path, **options: Any) -> int:
    """ProteinGym's assays: score them, and print the mean over them for each model."""
    from longlens.jobs.proteingym_job import score_proteingym
    from longlens.jobs.runner import SKIPPED

    warn_of_default_model()
    with shown_progress() as progress:
        scores = score_proteingym(assays, progress=progress, **options)
    for row in scores.summary:
        if row["kind"] == "all":
            error = "" if math.isnan(row["error"]) else f" +- {row['error']:.3f}"
            click.echo(f"spearman    {row['spearman']:.3f}{error}, {row['model']}, {row['assays']:,} assays")
    click.echo(f"results     {scores.folder / 'summary.csv'}")
    if scores.skipped:
        click.echo(f"{scores.skipped:,} variants are not scored: see `problem` in by-model", err=True)
    return SKIPPED if scores.skipped else 0
