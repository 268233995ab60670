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
    from longlens.io.delimited import DelimitedTable
    from longlens.io.variants import Mutation
    from longlens.models.language_model import MaskedLM

# finished, but variants were skipped
SKIPPED = 3


@click.command(cls=WordsCommand)
@click.argument(
    "variants", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True)
)
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
@click.option("--mutation-col", default="mutant", show_default=True, help="Column of variants: A24G, A24G:T56S, "
              "p.Lys2Ala, WT.")  # fmt: skip
@click.option("--protein-col", default=None, help="Column with the protein's id in the FASTA, where it has several.")
@click.option("--offset-idx", default=1, show_default=True, help="Number of the first residue.")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do with a variant that cannot be scored; `skip` says why in the column `problem`.",
)
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
    on_error: str,
    tokens_per_batch: int,
    model: str,
    dtype: str,
    device: str,
    method: str,
) -> int:
    """Score the variants of a CSV or TSV file, plain or gzipped ("-" is standard input): its columns come back with one
    more, named after the model.

    Higher is better tolerated. `--all` writes position, wild type, and a column for each of the 20 residues. Exit: 0
    done, 2 wrong input, 3 done but for skipped variants.
    """
    if (variants is None) != everything:
        raise click.UsageError("give a CSV of variants or --all, one of the two")
    if (fasta is None) == (sequence is None):
        raise click.UsageError("give the protein with --fasta or --sequence, one of the two")
    if everything and scoring_strategy == "pseudo-ppl":
        raise click.UsageError("--all takes wt-marginals or masked-marginals: pseudo-ppl would need L x 20 x L passes")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise click.UsageError(f"expected -o to name a file in a folder that exists, got {output}")
    if str(variants) == "-" and str(fasta) == "-":
        raise click.UsageError("give the variants or the proteins by standard input, one of the two")
    proteins = _proteins(fasta, sequence)
    skipped = 0
    settings = {"strategy": scoring_strategy, "method": method, "budget": tokens_per_batch, "offset": offset_idx}
    if variants is None:
        protein = _only(proteins, "--all takes a FASTA of one")
        text = _substitutions(load_model(model, dtype, device), protein, settings)
    else:
        # everything that can be wrong with the table is found before the model is loaded
        asked = _read_variants(variants, proteins, mutation_col, protein_col, offset_idx, on_error)
        skipped = sum(reason != "" for reason in asked.problems or ())
        loaded = load_model(model, dtype, device)
        text = _scored(loaded, asked, settings)
    if output is None:
        sys.stdout.write(text)
    else:
        from longlens.io.results import write_whole

        write_whole(output, text.encode())
    if skipped:
        click.echo(f"{skipped:,} variants are not scored: see the column `problem`", err=True)
    return SKIPPED if skipped else 0


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
    """A table of variants, read and checked: for each protein its rows' numbers and mutations; `problems`, one for each
    row and empty where there is none, exists where faulty rows are skipped."""

    table: DelimitedTable
    groups: list[tuple[str, str, list[int], list[tuple[Mutation, ...]]]]
    problems: list[str] | None


def _read_variants(
    path: Path, proteins: list[tuple[str, str]], mutation_col: str, protein_col: str | None, offset: int, on_error: str
) -> _Asked:
    from longlens.errors import SequenceError, VariantError
    from longlens.io.delimited import read_delimited
    from longlens.io.variants import parse_variant

    table = read_delimited(path)
    table.require([mutation_col, *filter(None, [protein_col])])
    if on_error == "skip" and "problem" in table.columns:
        raise SequenceError(f"{table.name}: has a column 'problem' already; rename it")
    names = [name for name, _ in proteins]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if protein_col and repeated:
        raise SequenceError(f"expected proteins with ids of their own, got more than one {repeated[0]!r}")
    known = dict(proteins) if protein_col else {"": _only(proteins, "say with --protein-col which row means which")}
    groups: dict[str, tuple[list[int], list[tuple[Mutation, ...]]]] = {}
    problems = [""] * len(table.rows)
    for number, row in enumerate(table.rows):
        name = row[protein_col] if protein_col else ""
        try:
            if name not in known:
                raise VariantError(
                    f"expected a protein of the FASTA in column {protein_col!r}, got {name!r}", f"no protein {name!r}"
                )
            mutations = parse_variant(row[mutation_col], known[name], offset)
        except VariantError as error:
            if on_error == "stop":
                raise VariantError(f"{table.place(number)}: {error}", error.reason) from None
            problems[number] = error.reason
            continue
        members, parsed = groups.setdefault(name, ([], []))
        members.append(number)
        parsed.append(mutations)
    listed = [(name, known[name], members, parsed) for name, (members, parsed) in groups.items()]
    return _Asked(table, listed, problems if on_error == "skip" else None)


def _scored(model: MaskedLM, asked: _Asked, settings: dict[str, Any]) -> str:
    from longlens.errors import SequenceError
    from longlens.io.delimited import write_delimited
    from longlens.jobs.score import refuse_unknown, score_variants
    from longlens.models.encoder import attend_with

    table = asked.table
    column = Path(model.source).name
    if column in table.columns:
        column = f"{column}_{settings['strategy']}"
    if column in table.columns:
        raise SequenceError(f"{table.name}: has a column {column!r} already; rename it, or score another file")
    for _, _, members, parsed in asked.groups:
        for number, mutations in zip(members, parsed, strict=True):
            refuse_unknown(model, mutations, table.place(number))
    # skipped rows stay empty
    cells = [""] * len(table.rows)
    for name, sequence, members, parsed in asked.groups:
        with _bar(name or "variants") as report:
            scores = score_variants(
                model, sequence, parsed, settings["strategy"], attend=attend_with(settings["method"]),
                budget=settings["budget"], report=report,
            )  # fmt: skip
        for number, value in zip(members, scores, strict=True):
            cells[number] = f"{value:.6f}"
    return write_delimited(table, {column: cells} | ({} if asked.problems is None else {"problem": asked.problems}))


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; calls (done, total) move it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
