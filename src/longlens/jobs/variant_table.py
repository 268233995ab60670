"""A table of variants, read and compared with its proteins before any computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longlens.errors import SequenceError, VariantError
from longlens.io.compression import SUFFIXES
from longlens.io.delimited import DelimitedTable, read_delimited
from longlens.io.variants import Mutation, parse_variant
from longlens.jobs.inputs import ProteinSource

# the column that says why a row has no score
PROBLEM = "problem"
TABLES = (".csv", ".tsv", ".tab", ".txt", *SUFFIXES)


@dataclass(frozen=True)
class ProteinVariants:
    """Variants of one protein: its number in the input, the rows of the table, and the mutations of each."""

    protein: int
    sequence: str
    rows: list[int]
    variants: list[tuple[Mutation, ...]]

    @property
    def positions(self) -> list[int]:
        """The mutated positions, in order."""
        return sorted({mutation.position for variant in self.variants for mutation in variant})


@dataclass(frozen=True)
class VariantTable:
    """`problems` has a text for each row, empty for valid rows; it is None unless faulty rows are skipped."""

    table: DelimitedTable
    column: str
    protein_column: str | None
    groups: list[ProteinVariants]
    problems: list[str] | None

    def new_column(self, model: str, strategy: str) -> str:
        """The name of the column of scores. Raises `SequenceError` if all names are taken."""
        for name in (model, f"{model}_{strategy}"):
            if name not in self.table.columns:
                return name
        raise SequenceError(f"{self.table.name}: has a column {name!r} already; rename it, or score another file")


def table_of(variants: Sequence[str], column: str) -> DelimitedTable:
    """Variants in a list, as a table of one column."""
    rows = [{column: str(variant)} for variant in variants]
    return DelimitedTable("the variants", [column], rows, list(range(1, len(rows) + 1)), ",")


def read_variants(
    variants: str | Path | Sequence[str],
    source: ProteinSource,
    *,
    mutation_col: str,
    protein_col: str | None,
    offset: int,
    skip_errors: bool,
) -> VariantTable:
    """The variants of a table's file, of a list, or the only one in a string, by protein in the order of the input.

    Raises `SequenceError` for a table without the columns, and `VariantError` for the first variant that cannot be read
    (with `skip_errors` its reason goes to `problems`).
    """
    if isinstance(variants, str) and not _is_table(variants):
        variants = [variants]
    table = read_delimited(variants) if isinstance(variants, str | Path) else table_of(variants, mutation_col)
    table.require([mutation_col, *filter(None, [protein_col])])
    if skip_errors and PROBLEM in table.columns:
        raise SequenceError(f"{table.name}: has a column {PROBLEM!r} already; rename it")
    numbers = _numbers(source, protein_col)
    sequences = list(source.sequences())
    groups: dict[int, ProteinVariants] = {}
    problems = [""] * len(table.rows)
    for row, cells in enumerate(table.rows):
        name = cells[protein_col] if protein_col else ""
        try:
            if name not in numbers:
                raise VariantError(
                    f"expected a protein of the FASTA in column {protein_col!r}, got {name!r}", f"no protein {name!r}"
                )
            protein = numbers[name]
            mutations = parse_variant(cells[mutation_col], sequences[protein], offset)
        except VariantError as error:
            if not skip_errors:
                raise VariantError(f"{table.place(row)}: {error}", error.reason) from None
            problems[row] = error.reason
            continue
        group = groups.setdefault(protein, ProteinVariants(protein, sequences[protein], [], []))
        group.rows.append(row)
        group.variants.append(mutations)
    ordered = [groups[protein] for protein in sorted(groups)]
    return VariantTable(table, mutation_col, protein_col, ordered, problems if skip_errors else None)


def _is_table(name: str) -> bool:
    """Whether a string names a table ("-" is standard input) and is not a variant itself."""
    return name == "-" or Path(name).suffix.lower() in TABLES or "/" in name or Path(name).exists()


def _numbers(source: ProteinSource, protein_col: str | None) -> dict[str, int]:
    """Each protein's number by its id; by "" if there is one protein and no column of ids."""
    ids = [entry.id for entry in source.survey.entries]
    if protein_col is None:
        refuse_several(source, "name the column of the protein's id with --protein-col (in Python protein_col)")
        return {"": 0}
    repeated = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
    if repeated:
        raise SequenceError(f"expected proteins with ids of their own, got more than one {repeated[0]!r}")
    return {name: number for number, name in enumerate(ids)}


def refuse_several(source: ProteinSource, advice: str) -> None:
    """Raise `SequenceError` if there is more than one protein."""
    count = len(source.survey.entries)
    if count != 1:
        raise SequenceError(f"expected one protein, found {count}; {advice}")
