"""ProteinGym's files of deep mutational scans: a reference file and a table of variants for each assay.

    reference   DMS_id, DMS_filename, target_seq; UniProt_ID, coarse_selection_type, taxon where they are known
    an assay    mutant (A1P:D2N), DMS_score; mutated_sequence and DMS_score_bin where they are known

As in the substitution benchmark of Notin et al. 2023 (ProteinGym, NeurIPS). A higher DMS_score is fitter, so that the
Spearman correlation with a model's scores has a sign.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError, SequenceError, VariantError
from longlens.io.alphabet import clean_protein
from longlens.io.delimited import DelimitedTable, read_delimited
from longlens.io.variants import mutate, parse_variant

MUTANT, SEQUENCE, SCORE, BIN = "mutant", "mutated_sequence", "DMS_score", "DMS_score_bin"
REFERENCE = "DMS_substitutions.csv"
_SIMPLE = re.compile(r"([A-Za-z])(\d+)([A-Za-z])")


@dataclass(frozen=True)
class Assay:
    """An assay and its protein. `uniprot` is the assay's own id, and the others empty, where nothing is known."""

    id: str
    path: Path
    target: str
    uniprot: str
    selection: str = ""
    taxon: str = ""


def find_assays(given: Path, reference: Path | None) -> tuple[list[Assay], list[str]]:
    """The assays of a folder, or of one file, in the order of the reference file; and warnings, one sentence each.

    The reference file is `reference`, or `DMS_substitutions.csv` in the folder, beside it, or in `reference_files`.
    Without one, the protein of an assay is its first variant with its mutations undone.

    Raises:
        InputError: no assays, or none of those in the reference file.
        SequenceError: a reference file without its columns, an assay without mutated sequences where they are needed.
    """
    if not given.exists():
        raise InputError(f"expected a folder or a file of ProteinGym, found no {given}")
    folder = given if given.is_dir() else given.parent
    places = [base / part for base in (folder, folder.parent) for part in (REFERENCE, f"reference_files/{REFERENCE}")]
    reference = reference or next((path for path in places if path.is_file()), None)
    files = sorted(folder.glob("*.csv")) if given.is_dir() else [given]
    files = [path for path in files if path.name != REFERENCE]
    if not files:
        raise InputError(f"expected tables of assays (.csv) in {given}, found none")
    if reference is None:
        warning = f"no reference file ({REFERENCE}) was found: proteins come from the assays, and none are grouped"
        return [Assay(path.stem, path, _undone(path), path.stem) for path in files], [warning]
    assays = _listed(reference, files)
    if not assays:
        raise InputError(
            f"{reference}: expected a row for an assay of {given}, found none; DMS_filename names the file"
        )
    known = {assay.path for assay in assays}
    unknown = [path.name for path in files if path not in known]
    more = ", ..." if len(unknown) > 3 else ""
    warnings = [f"{reference.name} has no row for {', '.join(unknown[:3])}{more}, which is left out"] if unknown else []
    return assays, warnings


def _listed(reference: Path, files: Sequence[Path]) -> list[Assay]:
    table = read_delimited(reference)
    table.require(["DMS_id", "DMS_filename", "target_seq"])
    by_name = {path.name: path for path in files}
    assays: list[Assay] = []
    for row, cells in enumerate(table.rows):
        path = by_name.get(cells["DMS_filename"])
        if path is None:
            continue
        target = clean_protein(cells["target_seq"], table.place(row)).sequence
        if not re.fullmatch(r"[\w.\-]+", cells["DMS_id"]) or any(cells["DMS_id"] == other.id for other in assays):
            raise SequenceError(
                f"{table.place(row)}: expected a DMS_id that can name a file, once, got {cells['DMS_id']!r}"
            )
        uniprot = cells.get("UniProt_ID") or cells["DMS_id"]
        assays.append(Assay(cells["DMS_id"], path, target, uniprot, cells.get("coarse_selection_type", ""),
                            cells.get("taxon", "")))  # fmt: skip
    return assays


def _undone(path: Path) -> str:
    """The protein of an assay: its first variant with the mutations undone."""
    table = read_assay(path)
    table.require([SEQUENCE])
    if not table.rows:
        raise SequenceError(f"{path}: expected variants, found none")
    residues = list(clean_protein(table.rows[0][SEQUENCE], table.place(0)).sequence)
    for part in table.rows[0][MUTANT].split(":"):
        match = _SIMPLE.fullmatch(part.strip())
        if match is None or not 1 <= int(match[2]) <= len(residues) or residues[int(match[2]) - 1] != match[3].upper():
            raise SequenceError(
                f"{table.place(0)}: expected {SEQUENCE} to have the mutations of {MUTANT}, got {part!r}; give the "
                "reference file with --reference"
            )
        residues[int(match[2]) - 1] = match[1].upper()
    return "".join(residues)


def read_assay(path: Path) -> DelimitedTable:
    """The table of an assay. Raises `SequenceError` if `mutant` or `DMS_score` is missing."""
    table = read_delimited(path)
    table.require([MUTANT, SCORE])
    return table


def check_assay(assay: Assay, table: DelimitedTable) -> None:
    """Raise `SequenceError` if a variant's sequence is not the protein with its mutations, or a score is no number.

    Variants that cannot be read are left to the job, which refuses or skips them.
    """
    measured(table)
    if SEQUENCE not in table.columns:
        return
    for row, cells in enumerate(table.rows):
        try:
            variant = parse_variant(cells[MUTANT], assay.target)
        except VariantError:
            continue
        if mutate(assay.target, variant) != cells[SEQUENCE].strip().upper():
            raise SequenceError(
                f"{table.place(row)}: expected {SEQUENCE} to be the protein of {assay.id} with {cells[MUTANT]}, got "
                "another sequence; check target_seq of the reference file"
            )


def measured(table: DelimitedTable) -> NDArray[np.float64]:
    """The measured scores (V,), NaN where a cell is empty. Raises `SequenceError` for other texts."""
    return np.array(list(_numbers(table, SCORE)), np.float64)


def binary(table: DelimitedTable) -> NDArray[np.float64] | None:
    """1 for fit variants and 0 for others (V,), NaN where a cell is empty; None without the column."""
    return np.array(list(_numbers(table, BIN)), np.float64) if BIN in table.columns else None


def _numbers(table: DelimitedTable, column: str) -> Iterator[float]:
    for row, cells in enumerate(table.rows):
        try:
            yield float(cells[column] or "nan")
        except ValueError:
            raise SequenceError(f"{table.place(row)}: expected a number in {column}, got {cells[column]!r}") from None
