"""`longlens score`: zero-shot effects of variants."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longlens.cli.options import WordsCommand, load_model, model_options

if TYPE_CHECKING:
    from longlens.models.language_model import MaskedLM


@click.command(cls=WordsCommand)
@click.argument("variants", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--fasta", type=click.Path(path_type=Path), help="The proteins.")
@click.option("--sequence", help="The protein itself, instead of a file.")
@click.option("--all", "everything", is_flag=True, help="All L x 20 substitutions of one protein, instead of a CSV.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="CSV to write. [default: standard output]")
@click.option(
    "--scoring-strategy",
    type=click.Choice(["wt-marginals", "masked-marginals", "pseudo-ppl"]),
    default="masked-marginals",
    show_default=True,
)
@click.option("--mutation-col", default="mutant", show_default=True, help="Column of mutations: A24G or A24G:T56S.")
@click.option("--protein-col", default=None, help="Column with the protein's id in the FASTA, where it has several.")
@click.option("--offset-idx", default=1, show_default=True, help="Number of the first residue.")
@click.option("--tokens-per-batch", "--toks-per-batch", default=16_384, show_default=True)
@model_options
def score(
    variants: Path | None,
    fasta: Path | None,
    sequence: str | None,
    everything: bool,
    output: Path | None,
    scoring_strategy: str,
    mutation_col: str,
    protein_col: str | None,
    offset_idx: int,
    tokens_per_batch: int,
    model: str,
    dtype: str,
    device: str,
    method: str,
) -> None:
    """Score the variants of a CSV file: its columns come back with one more, named after the model.

    Higher is better tolerated. `--all` writes position, wild type, and a column for each of the 20 residues.
    """
    if (variants is None) != everything:
        raise click.UsageError("give a CSV of variants or --all, one of the two")
    if (fasta is None) == (sequence is None):
        raise click.UsageError("give the protein with --fasta or --sequence, one of the two")
    if everything and scoring_strategy == "pseudo-ppl":
        raise click.UsageError("--all takes wt-marginals or masked-marginals: pseudo-ppl would need L x 20 x L passes")
    proteins = _proteins(fasta, sequence)
    loaded = load_model(model, dtype, device)
    settings = {"strategy": scoring_strategy, "method": method, "budget": tokens_per_batch, "offset": offset_idx}
    if variants is None:
        text = _substitutions(loaded, proteins, settings)
    else:
        text = _scored(loaded, proteins, variants, mutation_col, protein_col, settings)
    if output is None:
        sys.stdout.write(text)
        return
    from longlens.io.results import write_whole

    write_whole(output, text.encode())


def _proteins(fasta: Path | None, sequence: str | None) -> dict[str, str]:
    from longlens.io.alphabet import clean_protein
    from longlens.io.fasta import read_fasta

    if sequence is not None:
        return {"": clean_protein(sequence, "--sequence").sequence}
    assert fasta is not None
    return {record.id: clean_protein(record.sequence, record.place).sequence for record in read_fasta(fasta)}


def _only(proteins: dict[str, str], why: str) -> str:
    if len(proteins) != 1:
        raise click.UsageError(f"expected one protein, found {len(proteins)}; {why}")
    return next(iter(proteins.values()))


def _substitutions(model: MaskedLM, proteins: dict[str, str], settings: dict[str, Any]) -> str:
    import csv
    import io

    from longlens.jobs.score import STANDARD, all_substitutions
    from longlens.models.encoder import attend_with

    sequence = _only(proteins, "--all takes a FASTA of one")
    with _bar("positions") as report:
        table = all_substitutions(
            model, sequence, masked=settings["strategy"] == "masked-marginals",
            attend=attend_with(settings["method"]), budget=settings["budget"], report=report,
        )  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["position", "wild_type", *STANDARD])
    for place, (residue, row) in enumerate(zip(sequence, table, strict=True)):
        writer.writerow([place + settings["offset"], residue, *(f"{value:.6f}" for value in row)])
    return text.getvalue()


def _scored(
    model: MaskedLM,
    proteins: dict[str, str],
    variants: Path,
    mutation_col: str,
    protein_col: str | None,
    settings: dict[str, Any],
) -> str:
    import csv
    import io

    from longlens.errors import SequenceError
    from longlens.jobs.score import parse_mutations, score_variants
    from longlens.models.encoder import attend_with

    with variants.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns, rows = list(reader.fieldnames or []), list(reader)
    for column in filter(None, (mutation_col, protein_col)):
        if column not in columns:
            raise SequenceError(f"{variants}: expected a column {column!r}, found {', '.join(columns) or 'none'}")
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row[protein_col] if protein_col else "", []).append(number)
    result = [0.0] * len(rows)
    for name, members in groups.items():
        if protein_col and name not in proteins:
            raise SequenceError(f"{variants}: expected proteins of the FASTA in column {protein_col!r}, got {name!r}")
        sequence = proteins[name] if protein_col else _only(proteins, "say with --protein-col which row means which")
        parsed = []
        for number in members:
            try:
                parsed.append(parse_mutations(rows[number][mutation_col] or "", sequence, settings["offset"]))
            except SequenceError as error:
                raise SequenceError(f"{variants}, line {number + 2}: {error}") from None
        with _bar(name or "variants") as report:
            scores = score_variants(
                model, sequence, parsed, settings["strategy"], attend=attend_with(settings["method"]),
                budget=settings["budget"], report=report,
            )  # fmt: skip
        for number, value in zip(members, scores, strict=True):
            result[number] = float(value)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, Path(model.source).name], lineterminator="\n")
    writer.writeheader()
    for row, value in zip(rows, result, strict=True):
        writer.writerow({**row, Path(model.source).name: f"{value:.6f}"})
    return text.getvalue()


def _bar(name: str) -> Any:
    """A progress bar on a terminal; calls (done, total) move it."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def shown() -> Any:
        console = Console(file=sys.stderr)
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    return shown()
