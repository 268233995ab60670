"""`longlens score`: zero-shot effects of variants."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longlens.cli.options import WordsCommand, load_model, method_option, model_options

if TYPE_CHECKING:
    from longlens.jobs.score import Mutation
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
@method_option
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
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise click.UsageError(f"expected -o to name a file in a folder that exists, got {output}")
    proteins = _proteins(fasta, sequence)
    settings = {"strategy": scoring_strategy, "method": method, "budget": tokens_per_batch, "offset": offset_idx}
    if variants is None:
        protein = _only(proteins, "--all takes a FASTA of one")
        text = _substitutions(load_model(model, dtype, device), protein, settings)
    else:
        # everything that can be wrong with the table is found before the model is loaded
        asked = _read_variants(variants, proteins, mutation_col, protein_col, offset_idx)
        loaded = load_model(model, dtype, device)
        text = _scored(loaded, asked, settings)
    if output is None:
        sys.stdout.write(text)
        return
    from longlens.io.results import write_whole

    write_whole(output, text.encode())


def _proteins(fasta: Path | None, sequence: str | None) -> list[tuple[str, str]]:
    """Names and cleaned sequences."""
    from longlens.io.alphabet import clean_protein
    from longlens.io.fasta import read_fasta

    if sequence is not None:
        raw = [("", sequence, "--sequence")]
    else:
        assert fasta is not None
        raw = [(record.id, record.sequence, record.place) for record in read_fasta(fasta)]
    proteins = []
    for name, text, place in raw:
        protein = clean_protein(text, place)
        if protein.gaps:
            click.echo(f"{place}: {protein.gaps} gaps are left out; positions count without them", err=True)
        if protein.substituted:
            click.echo(f"{place}: {protein.substituted} residues (J, inner *) are read as X", err=True)
        proteins.append((name, protein.sequence))
    return proteins


def _only(proteins: list[tuple[str, str]], why: str) -> str:
    if len(proteins) != 1:
        raise click.UsageError(f"expected one protein, found {len(proteins)}; {why}")
    return proteins[0][1]


def _substitutions(model: MaskedLM, sequence: str, settings: dict[str, Any]) -> str:
    import csv
    import io

    from longlens.io.alphabet import STANDARD
    from longlens.jobs.score import all_substitutions
    from longlens.models.encoder import attend_with

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


@dataclass(frozen=True)
class _Asked:
    """A table of variants, read and checked: its rows, and for each protein the rows' numbers and mutations."""

    path: Path
    columns: list[str]
    rows: list[dict[str, str]]
    groups: list[tuple[str, str, list[int], list[tuple[Mutation, ...]]]]


def _read_variants(
    path: Path, proteins: list[tuple[str, str]], mutation_col: str, protein_col: str | None, offset: int
) -> _Asked:
    import csv

    from longlens.errors import SequenceError
    from longlens.jobs.score import parse_mutations

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except UnicodeDecodeError as error:
        raise SequenceError(f"{path}: expected a CSV file in UTF-8, got other bytes ({error})") from None
    for column in filter(None, (mutation_col, protein_col)):
        if column not in columns:
            raise SequenceError(f"{path}: expected a column {column!r}, found {', '.join(columns) or 'none'}")
    names = [name for name, _ in proteins]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if protein_col and repeated:
        raise SequenceError(f"expected proteins with ids of their own, got more than one {repeated[0]!r}")
    known = dict(proteins)
    groups: dict[str, tuple[list[int], list[tuple[Mutation, ...]]]] = {}
    for number, row in enumerate(rows):
        where = f"{path}, line {number + 2}"
        if None in row:
            raise SequenceError(f"{where}: expected {len(columns)} cells, got more")
        name = row[protein_col] if protein_col else ""
        if protein_col and name not in known:
            raise SequenceError(f"{where}: expected a protein of the FASTA in column {protein_col!r}, got {name!r}")
        sequence = known[name] if protein_col else _only(proteins, "say with --protein-col which row means which")
        try:
            mutations = parse_mutations(row[mutation_col] or "", sequence, offset)
        except SequenceError as error:
            raise SequenceError(f"{where}: {error}") from None
        members, parsed = groups.setdefault(name, ([], []))
        members.append(number)
        parsed.append(mutations)
    listed = [
        (name, known[name] if protein_col else proteins[0][1], members, parsed)
        for name, (members, parsed) in groups.items()
    ]
    return _Asked(path, columns, rows, listed)


def _scored(model: MaskedLM, asked: _Asked, settings: dict[str, Any]) -> str:
    import csv
    import io

    from longlens.errors import SequenceError
    from longlens.jobs.score import refuse_unknown, score_variants
    from longlens.models.encoder import attend_with

    column = Path(model.source).name
    if column in asked.columns:
        column = f"{column}_{settings['strategy']}"
    if column in asked.columns:
        raise SequenceError(f"{asked.path}: has a column {column!r} already; rename it, or score another file")
    for _, _, members, parsed in asked.groups:
        for number, mutations in zip(members, parsed, strict=True):
            refuse_unknown(model, mutations, f"{asked.path}, line {number + 2}")
    result = [0.0] * len(asked.rows)
    for name, sequence, members, parsed in asked.groups:
        with _bar(name or "variants") as report:
            scores = score_variants(
                model, sequence, parsed, settings["strategy"], attend=attend_with(settings["method"]),
                budget=settings["budget"], report=report,
            )  # fmt: skip
        for number, value in zip(members, scores, strict=True):
            result[number] = float(value)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*asked.columns, column], lineterminator="\n")
    writer.writeheader()
    for row, value in zip(asked.rows, result, strict=True):
        writer.writerow({**row, column: f"{value:.6f}"})
    return text.getvalue()


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; calls (done, total) move it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
