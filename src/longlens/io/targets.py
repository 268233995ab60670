"""Proteins with targets to learn: FASTA with biotrainer's headers, tables of text, Parquet.

FASTA: `>id TARGET=membrane SET=train VALIDATION=False`. For targets by residue, TARGET is one letter for each residue
or values joined by `;`, or a second FASTA file holds them as its "sequences". Tables: columns id, sequence, target and,
where wanted, set, validation and mask (of 0 and 1: residues whose target counts). The names are those of biotrainer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longlens.errors import SequenceError
from longlens.io.alphabet import clean_protein
from longlens.io.compression import plain_name, read_bytes
from longlens.io.delimited import read_delimited
from longlens.io.fasta import STANDARD_INPUT, FastaRecord, read_fasta

TABLES = (".csv", ".tsv", ".tab", ".parquet")
# words of SET and what they mean here
SETS = {
    "": "", "train": "train", "training": "train", "val": "validation", "valid": "validation",
    "validation": "validation", "dev": "validation", "test": "test", "pred": "predict", "predict": "predict",
    "prediction": "predict",
}  # fmt: skip
_TRUE, _FALSE = ("true", "1", "yes"), ("", "false", "0", "no")
_HEADER = re.compile(r"(?:^|\s)(TARGET|SET|VALIDATION|MASK)=(\S*)", re.IGNORECASE)


@dataclass(frozen=True)
class LabelledProtein:
    """A protein with its target as text: one for the protein, or one for each residue ("": none is known).

    `place` is the file and line for messages. `set` is "train", "validation", "test", "predict", or "" where the file
    does not divide its proteins.
    """

    record: FastaRecord
    sequence: str
    targets: tuple[str, ...]
    set: str
    place: str


@dataclass(frozen=True)
class _Row:
    """A record before it is checked."""

    record: FastaRecord
    target: Any
    set: str
    validation: str
    mask: str
    place: str


def read_labelled(
    path: Path | str, *, by_residue: bool, numbers: bool, labels: Path | None = None, target_col: str = "target"
) -> list[LabelledProtein]:
    """The proteins of a file and their targets; `labels`: a file of the targets of residues.

    `by_residue`: a target for each residue; `numbers`: targets are numbers, so that those of residues are not letters.

    Raises:
        SequenceError: a file that cannot be read, a record without a target, targets that are not as many as residues,
            an unknown set, an id that occurs twice; names the file and the line.
    """
    rows = list(_table_rows(path, target_col) if _is_table(path) else _fasta_rows(path))
    if not rows:
        raise SequenceError(f"{path}: expected proteins with targets, found none")
    _refuse_repeated(rows)
    if labels is not None:
        if not by_residue:
            raise SequenceError("a file of labels holds targets of residues; for one target to a protein, give "
                                "TARGET= in the headers or a table")  # fmt: skip
        rows = _with_labels(rows, labels, target_col)
    proteins = [_checked(row, by_residue=by_residue, numbers=numbers) for row in rows]
    divided = [protein for protein in proteins if protein.set]
    if divided and len(divided) < len(proteins):
        undivided = next(protein for protein in proteins if not protein.set)
        raise SequenceError(f"{undivided.place}: expected a SET, as other records have one; give one to all or to none")
    return proteins


def _is_table(path: Path | str) -> bool:
    return plain_name(path).endswith(TABLES)


def header_lines(path: Path | str) -> list[int]:
    """The line of each record of a FASTA file, from 1."""
    text = read_bytes(path, STANDARD_INPUT if Path(path).name == STANDARD_INPUT else str(path))
    return [number for number, line in enumerate(text.splitlines(), 1) if line.startswith(b">")]


def _fasta_rows(path: Path | str) -> Iterator[_Row]:
    records = list(read_fasta(path))
    for record, line in zip(records, header_lines(path), strict=False):
        entries = {name.upper(): value for name, value in _HEADER.findall(record.description)}
        place = f"{record.source}, line {line} ({record.id or 'no name'})"
        yield _Row(
            record, entries.get("TARGET"), entries.get("SET", ""), entries.get("VALIDATION", ""),
            entries.get("MASK", ""), place,
        )  # fmt: skip


def _table_rows(path: Path | str, target_col: str, *, sequences: bool = True) -> Iterator[_Row]:
    needed = ["id", *(["sequence"] if sequences else []), target_col]
    for number, (cells, place) in enumerate(_cells(path, needed), 1):
        record = FastaRecord(str(cells["id"] or ""), "", str(cells.get("sequence") or ""), str(path), number)
        which, validation, mask = (str(_given(cells.get(name))) for name in ("set", "validation", "mask"))
        yield _Row(record, cells[target_col], which, validation, mask, f"{place} ({record.id or 'no name'})")


def _given(value: Any) -> Any:
    return "" if value is None else value


def _cells(path: Path | str, needed: list[str]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Rows of a table, and where each stands."""
    if not plain_name(path).endswith(".parquet"):
        table = read_delimited(path)
        table.require(needed)
        yield from ((row, table.place(number)) for number, row in enumerate(table.rows))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_table(pa.BufferReader(read_bytes(path, str(path))))
    except (OSError, pa.ArrowException) as error:
        raise SequenceError(f"{path}: expected a Parquet file ({str(error).splitlines()[0]})") from None
    for name in needed:
        if name not in columns.column_names:
            raise SequenceError(f"{path}: expected a column {name!r}, found {', '.join(columns.column_names)}")
    for number, row in enumerate(columns.to_pylist(), 1):
        yield row, f"{path}, row {number}"


def _refuse_repeated(rows: list[_Row]) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        if row.record.id in seen:
            raise SequenceError(
                f"{row.place}: expected ids that occur once, got {row.record.id!r} again, first at "
                f"{seen[row.record.id]}"
            )
        seen[row.record.id] = row.place


def _with_labels(rows: list[_Row], labels: Path, target_col: str) -> list[_Row]:
    """The rows with the targets, sets and masks of a file of labels."""
    if _is_table(labels):
        named = {row.record.id: row for row in _table_rows(labels, target_col, sequences=False)}
    else:
        named = {row.record.id: replace(row, target=row.record.sequence) for row in _fasta_rows(labels)}
    joined = []
    for row in rows:
        label = named.pop(row.record.id, None)
        if label is None:
            raise SequenceError(f"{row.place}: expected its targets in {labels}, found none of that id")
        joined.append(replace(
            row, target=label.target, set=label.set or row.set, validation=label.validation or row.validation,
            mask=label.mask or row.mask, place=label.place,
        ))  # fmt: skip
    if named:
        extra = next(iter(named.values()))
        raise SequenceError(f"{extra.place}: expected targets of proteins in the file, got those of another id")
    return joined


def _checked(row: _Row, *, by_residue: bool, numbers: bool) -> LabelledProtein:
    cleaned = clean_protein(row.record.sequence, row.place)
    which = _set(row)
    targets: tuple[str, ...] = ()
    if which != "predict":
        targets = tuple(_targets(row, by_residue=by_residue, numbers=numbers))
        if by_residue:
            if cleaned.gaps:
                raise SequenceError(f"{row.place}: expected residues without gaps, since targets are given by residue")
            if len(targets) != len(cleaned):
                raise SequenceError(
                    f"{row.place}: expected {len(cleaned):,} targets, one for each residue, got {len(targets):,}"
                )
            targets = _masked(targets, row)
    return LabelledProtein(row.record, cleaned.sequence, targets, which, row.place)


def _set(row: _Row) -> str:
    word, validation = row.set.strip().lower(), row.validation.strip().lower()
    if word not in SETS:
        raise SequenceError(f"{row.place}: expected SET of train, validation, test or pred, got {row.set!r}")
    if validation not in _TRUE + _FALSE:
        raise SequenceError(f"{row.place}: expected VALIDATION of True or False, got {row.validation!r}")
    if validation in _TRUE:
        if SETS[word] not in ("train", "validation", ""):
            raise SequenceError(f"{row.place}: expected VALIDATION=True in the training set, got SET={row.set}")
        return "validation"
    return SETS[word]


def _targets(row: _Row, *, by_residue: bool, numbers: bool) -> list[str]:
    value = row.target
    if value is None or (isinstance(value, str) and not value.strip()):
        raise SequenceError(f"{row.place}: expected a target, got none; give TARGET= or fill the column")
    if isinstance(value, list | tuple):
        if not by_residue:
            raise SequenceError(f"{row.place}: expected one target for the protein, got a list of {len(value)}")
        return ["" if item is None else str(item).strip() for item in value]
    text = str(value).strip()
    if not by_residue:
        return [text]
    listed = text.strip("[]")
    if numbers or ";" in listed or "," in listed:
        return [item.strip() for item in re.split(r"\s*[;,]\s*|\s+", listed.strip(";, "))]
    return list(listed)


def _masked(targets: tuple[str, ...], row: _Row) -> tuple[str, ...]:
    """The targets, "" where the mask is 0."""
    if not row.mask:
        return targets
    if len(row.mask) != len(targets) or set(row.mask) - {"0", "1"}:
        raise SequenceError(
            f"{row.place}: expected a mask of {len(targets):,} digits 0 and 1, one for each residue, got "
            f"{row.mask[:20]!r} of {len(row.mask):,}"
        )
    return tuple(target if kept == "1" else "" for target, kept in zip(targets, row.mask, strict=True))
