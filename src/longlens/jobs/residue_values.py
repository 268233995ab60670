"""One number for each residue of a protein, from any result of longlens or a table of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.alphabet import STANDARD, clean_protein
from longlens.io.delimited import read_delimited
from longlens.io.reading import open_results
from longlens.io.results import MANIFEST, read_manifest
from longlens.io.survey import read_cleaned

# columns of tables that hold the residue itself
LETTERS = ("wild_type", "residue", "label", "token")
# the column that stands for the 19 substitutions of each position in a table of `longlens score --all`
MEAN = "mean"


@dataclass(frozen=True)
class ResidueValues:
    """`values` (L,) of the protein `id`. `sequence` is None where the results do not hold it; `sha256` is its hash."""

    id: str
    values: NDArray[np.float64]
    sequence: str | None
    sha256: str

    def matches(self, sequence: str) -> bool:
        """Whether a sequence is this protein's, letter by letter."""
        return digest(sequence) == self.sha256


def digest(sequence: str) -> str:
    """The hash of a cleaned sequence, as tables of results have it."""
    return hashlib.sha256(sequence.encode()).hexdigest()


def read_residue_values(
    path: Path, column: str, *, protein: str | None = None, fasta: Path | None = None, alike: Collection[str] = ()
) -> ResidueValues:
    """The numbers of one protein.

    Args:
        path: a folder of `longlens embed` (an array such as surprise), `longlens look` (a column of `tokens`) or
            `longlens context` (a column of `keys`, of one target), or a table (.csv, .tsv, .parquet) with a column of
            residues (wild_type, residue, label or token).
        column: the array or column; "mean" is the mean effect of the 19 substitutions in a table of `score --all`.
        protein: its id, where there are several.
        fasta: the proteins, for results that do not hold their sequences.
        alike: sequences, by which the protein is recognised if there are several and `protein` is None.

    Raises:
        InputError: no such results, column or protein, or several of them.
    """
    # read even where it is not needed, so that a wrong file is never passed over
    sequences = None if fasta is None else list(read_cleaned([fasta]))
    known = {digest(sequence) for sequence in alike}
    if path.is_dir():
        found = _from_folder(path, column, protein, known)
    elif path.suffix == ".parquet":
        found = _from_table(_read_parquet(path), str(path), column, protein, known)
    else:
        table = read_delimited(path)
        columns = {name: [row[name] for row in table.rows] for name in table.columns}
        found = _from_table(columns, table.name, column, protein, known)
    if sequences is None or found.sequence is not None:
        return found
    sequence = next((text for text in sequences if found.matches(text)), None)
    if sequence is None:
        raise InputError(f"{fasta}: expected the protein {found.id!r} as it was embedded, found none with its residues")
    return ResidueValues(found.id, found.values, sequence, found.sha256)


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    try:
        columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    except FileNotFoundError:
        raise InputError(f"{path}: expected a table or a folder of results, found none") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a table in Parquet, it cannot be read ({error}); write it again") from None
    return columns


def _from_folder(folder: Path, column: str, protein: str | None, alike: set[str]) -> ResidueValues:
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    if "folders" in manifest:
        return _from_tables(folder, manifest, column, protein, alike)
    results = open_results(folder)
    rows = [row for row in results.table if row["problem"] is None]
    arrays = [name for name in results if results[name].ndim == 1]
    if column not in arrays:
        raise InputError(
            f"{folder}: expected an array with a number for each residue ({', '.join(arrays) or 'there is none'}), got "
            f"{column!r}; embed with --include surprise"
        )
    row = rows[_choice([row["id"] for row in rows], [row["sha256"] for row in rows], protein, alike, str(folder))]
    return ResidueValues(row["id"], results.residues(column, row).astype(np.float64), None, row["sha256"])


def _from_tables(
    folder: Path, manifest: Mapping[str, Any], column: str, protein: str | None, alike: set[str]
) -> ResidueValues:
    """Of results with a folder for each protein: those of look, or of context."""
    ids = manifest["proteins"]["ids"]
    tables = [_table_of(folder / name) for name in manifest["folders"]]
    hashes: list[str | None] = [None] * len(ids)
    if protein is None and len(ids) > 1:
        hashes = [_hash_of(table) for table in tables]
    place = _choice(ids, hashes, protein, alike, str(folder))
    found = _from_table(_read_parquet(tables[place]), str(tables[place]), column, None, alike)
    return ResidueValues(ids[place], found.values, found.sequence, found.sha256)


def _table_of(folder: Path) -> Path:
    """The table of a protein's residues. Raises `InputError` if there is none."""
    for name in ("tokens.parquet", "keys.parquet"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{folder}: expected tokens.parquet of longlens look or keys.parquet of longlens context, found neither; give "
        "a table with a column of residues"
    )


def _hash_of(table: Path) -> str:
    """The hash of the protein in a table of its residues."""
    columns = _read_parquet(table)
    letters = _letters(columns, str(table))
    return digest(_sequence(columns[letters], _rows(columns, letters)))


def _letters(columns: Mapping[str, Sequence[Any]], where: str) -> str:
    """The column of residues. Raises `InputError` if there is none."""
    letters = next((name for name in LETTERS if name in columns), None)
    if letters is None:
        raise InputError(f"{where}: expected a column of residues ({', '.join(LETTERS)}), found {', '.join(columns)}")
    return letters


def _rows(columns: Mapping[str, Sequence[Any]], letters: str) -> list[int]:
    """The rows of residues: not of special tokens, which a table names, or writes with several letters."""
    if "special" in columns:
        return [row for row, special in enumerate(columns["special"]) if not special]
    every = range(len(columns[letters]))
    return list(every) if "key" not in columns else [row for row in every if len(str(columns[letters][row])) == 1]


def _choice(ids: Sequence[str], hashes: Sequence[str | None], protein: str | None, alike: set[str], where: str) -> int:
    """The place of the protein with an id, or of the only one, or of the only one among those whose hash is known."""
    if protein is not None:
        places = [place for place, id in enumerate(ids) if id == protein]
    else:
        places = list(range(len(ids)))
        if len(places) > 1:
            places = [place for place in places if hashes[place] in alike]
    if len(places) == 1:
        return places[0]
    if protein is not None:
        raise InputError(f"{where}: expected the id of one protein, got {protein!r}, which {len(places)} have")
    raise InputError(f"{where}: expected one protein of the structure's sequence, found {len(places)} of {len(ids)}; "
                     "name the one that is meant with --protein")  # fmt: skip


def _from_table(
    columns: Mapping[str, Sequence[Any]], where: str, column: str, protein: str | None, alike: set[str]
) -> ResidueValues:
    letters = _letters(columns, where)
    if column == MEAN and column not in columns and set(STANDARD) <= columns.keys():
        columns = dict(columns) | {MEAN: _means(columns, letters, where)}
    if column not in columns:
        raise InputError(f"{where}: expected a column {column!r}, found {', '.join(columns)}")
    rows = _rows(columns, letters)
    targets = set(columns["target"]) if {"key", "target"} <= columns.keys() else set()
    if len(targets) > 1:
        raise InputError(
            f"{where}: expected the effects on one target, got those on {len(targets)}; run longlens context with the "
            "one that is meant as --targets"
        )
    if "id" in columns:
        of_id: dict[str, list[int]] = {}
        for row in rows:
            of_id.setdefault(str(columns["id"][row]), []).append(row)
        hashes = [digest(_sequence(columns[letters], part)) for part in of_id.values()]
        name = list(of_id)[_choice(list(of_id), hashes, protein, alike, where)]
        rows = of_id[name]
    else:
        name = protein or Path(where).stem
    given = _sequence(columns[letters], rows)
    sequence = clean_protein(given, where).sequence if len(given) == len(rows) and rows else ""
    if len(sequence) != len(rows) or not rows:
        raise InputError(f"{where}: expected one letter for each residue in column {letters!r}, got other texts")
    values = _numbers([columns[column][row] for row in rows], column, where)
    if not np.isfinite(values).any():
        raise InputError(f"{where}: expected numbers in column {column!r}, got none in {len(rows):,} rows")
    return ResidueValues(name, values, sequence, digest(sequence))


def _sequence(letters: Sequence[Any], rows: Sequence[int]) -> str:
    """The letters of these rows, in upper case."""
    return "".join(str(letters[row]) for row in rows).upper()


def _numbers(cells: Sequence[Any], column: str, where: str) -> NDArray[np.float64]:
    """Cells as numbers, NaN for empty ones. Raises `InputError` for anything else."""
    try:
        return np.array([float("nan" if cell is None or cell == "" else cell) for cell in cells], np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: expected numbers in column {column!r} ({error})") from None


def _means(columns: Mapping[str, Sequence[Any]], letters: str, where: str) -> list[float]:
    """The mean effect of the 19 substitutions of each residue, NaN where one is missing."""
    effects = np.stack([_numbers(columns[residue], residue, where) for residue in STANDARD], 1)
    # that of the residue itself is 0, or left out
    own = np.array([str(letter).upper() for letter in columns[letters]])[:, None] == np.array(list(STANDARD))
    # a wild type such as X is none of the 20
    means: list[float] = (np.where(own, 0.0, effects).sum(1) / (~own).sum(1)).tolist()
    return means
