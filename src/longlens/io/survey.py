"""A first pass over the input: what is there, what is wrong with it, and its hash, before any work starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longlens.errors import SequenceError
from longlens.io.alphabet import clean_protein
from longlens.io.fasta import Record, read_fasta


@dataclass(frozen=True)
class Entry:
    """A protein of the input: where it stood, its name, and what cleaning did; `sha256` is of the cleaned residues."""

    number: int
    source: str
    id: str
    description: str
    length: int
    sha256: str
    substituted: int
    gaps: int


@dataclass(frozen=True)
class Skipped:
    """A record that was left out, and why."""

    source: str
    number: int
    id: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """All of the input. `inputs`: name and SHA-256 of the records read from each file."""

    entries: list[Entry]
    skipped: list[Skipped]
    inputs: list[dict[str, str]]


def survey(paths: Sequence[Path | str], *, skip_errors: bool = False) -> Survey:
    """Read all of `paths`; with `skip_errors`, broken records and the broken rest of a file are listed, not raised.

    Raises `SequenceError` for the first fault otherwise, and where no protein is left.
    """
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    inputs = []
    for path in paths:
        digest = hashlib.sha256()
        try:
            for record in read_fasta(path):
                digest.update(f">{record.id} {record.description}\n{record.sequence}\n".encode())
                try:
                    entries.append(_entry(record))
                except SequenceError as error:
                    if not skip_errors:
                        raise
                    skipped.append(Skipped(Path(record.source).name, record.number, record.id, str(error)))
        except SequenceError as error:
            if not skip_errors:
                raise
            skipped.append(Skipped(Path(str(path)).name, 0, "", str(error)))
        inputs.append({"name": Path(str(path)).name, "sha256": digest.hexdigest()})
    if not entries:
        first = f"; the first fault: {skipped[0].reason}" if skipped else ""
        raise SequenceError(f"expected proteins in {', '.join(map(str, paths))}, found none{first}")
    return Survey(entries, skipped, inputs)


def read_cleaned(paths: Sequence[Path | str], *, skip_errors: bool = False) -> Iterator[str]:
    """The cleaned sequences of a survey's entries, in order."""
    for path in paths:
        try:
            for record in read_fasta(path):
                try:
                    cleaned = clean_protein(record.sequence, record.place)
                except SequenceError:
                    if not skip_errors:
                        raise
                    continue
                yield cleaned.sequence
        except SequenceError:
            if not skip_errors:
                raise


def _entry(record: Record) -> Entry:
    protein = clean_protein(record.sequence, record.place)
    return Entry(
        number=record.number,
        source=Path(record.source).name,
        id=record.id,
        description=record.description,
        length=len(protein),
        sha256=hashlib.sha256(protein.sequence.encode()).hexdigest(),
        substituted=protein.substituted,
        gaps=protein.gaps,
    )
