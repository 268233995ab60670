"""A first pass over the input, before any computation: its records, their faults, and its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longlens.errors import SequenceError
from longlens.io.alphabet import (
    CleanedProtein,
    clean_protein,
    looks_like_alignment,
    looks_like_dna,
    looks_like_text,
    may_be_complex,
)
from longlens.io.fasta import FastaRecord, read_fasta

# how many records are examined to recognise an alignment
LOOKED_AT = 100


Chains = Callable[[], bool]
"""Whether complexes of several chains are taken: asked at most once a record, where there may be one."""


def no_chains() -> bool:
    """Complexes are refused."""
    return False


@dataclass(frozen=True)
class RecordInfo:
    """A protein of the input: its file, number and name, and what cleaning did; `sha256` is of the cleaned residues."""

    number: int
    source: str
    id: str
    description: str
    length: int
    sha256: str
    substituted: int
    gaps: int


@dataclass(frozen=True)
class SkippedRecord:
    """A record that was left out, and why."""

    source: str
    number: int
    id: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """The whole input. `inputs`: name and SHA-256 of the records read from each file; `warnings`: one sentence each."""

    entries: list[RecordInfo]
    skipped: list[SkippedRecord]
    inputs: list[dict[str, str]]
    warnings: list[str] = field(default_factory=list)

    @property
    def longest(self) -> RecordInfo:
        """The longest protein."""
        return max(self.entries, key=lambda entry: entry.length)


def survey(paths: Sequence[Path | str], *, skip_errors: bool = False, chains: Chains = no_chains) -> Survey:
    """Read all of `paths`; with `skip_errors`, broken records and the broken rest of a file are listed, not raised.

    Otherwise raises `SequenceError` for the first fault, and always if no protein is left.
    """
    return _survey([(str(path), Path(str(path)).name, read_fasta(path)) for path in paths], skip_errors, chains)


def make_survey(records: Sequence[FastaRecord], *, skip_errors: bool = False, chains: Chains = no_chains) -> Survey:
    """The survey of records that are in memory."""
    return _survey([("the sequences", "sequences", records)], skip_errors, chains)


def _survey(sources: Sequence[tuple[str, str, Iterable[FastaRecord]]], skip_errors: bool, chains: Chains) -> Survey:
    entries: list[RecordInfo] = []
    skipped: list[SkippedRecord] = []
    inputs, suspicions = [], _InputWarnings()
    for _, name, records in sources:
        digest, read = hashlib.sha256(), False
        try:
            for record in records:
                read = True
                digest.update(f">{record.id} {record.description}\n{record.sequence}\n".encode())
                try:
                    entries.append(_entry(record, chains))
                    suspicions.see(record)
                except SequenceError as error:
                    if not skip_errors:
                        raise
                    skipped.append(SkippedRecord(Path(record.source).name, record.number, record.id, str(error)))
        except SequenceError as error:
            if not skip_errors:
                raise
            skipped.append(SkippedRecord(name, 0, "", f"{error}{'' if read else '; nothing of it was read'}"))
        inputs.append({"name": name, "sha256": digest.hexdigest()})
    if not entries:
        first = f"; the first fault: {skipped[0].reason}" if skipped else ""
        raise SequenceError(f"expected proteins in {', '.join(path for path, _, _ in sources)}, found none{first}")
    return Survey(entries, skipped, inputs, suspicions.warnings())


class _InputWarnings:
    """Finds records that look like DNA or RNA, and an alignment by the first records."""

    def __init__(self) -> None:
        self._records = 0
        self._nucleic: list[str] = []
        self._first: list[str] = []

    def see(self, record: FastaRecord) -> None:
        self._records += 1
        if looks_like_dna(record.sequence):
            self._nucleic.append(record.place)
        if len(self._first) < LOOKED_AT:
            self._first.append(record.sequence)

    def warnings(self) -> list[str]:
        """One sentence for each kind of doubtful input."""
        sentences = []
        if self._nucleic:
            sentences.append(
                f"{len(self._nucleic):,} of {self._records:,} records look like DNA or RNA (the first: "
                f"{self._nucleic[0]}) and are read as protein; translate them first"
            )
        if looks_like_alignment(self._first):
            sentences.append(
                "the records look like rows of an alignment (aligned FASTA or a3m): each is read as a protein of its "
                "own, without its gaps and with its insertions"
            )
        return sentences


def read_cleaned(
    paths: Sequence[Path | str], *, skip_errors: bool = False, chains: Chains = no_chains
) -> Iterator[str]:
    """The cleaned sequences of a survey's entries, in order."""
    for path in paths:
        try:
            for record in read_fasta(path):
                try:
                    cleaned = _clean(record, chains)
                except SequenceError:
                    if not skip_errors:
                        raise
                    continue
                yield cleaned.sequence
        except SequenceError:
            if not skip_errors:
                raise


def _entry(record: FastaRecord, chains: Chains) -> RecordInfo:
    protein = _clean(record, chains)
    return RecordInfo(
        number=record.number,
        source=Path(record.source).name,
        id=record.id,
        description=record.description,
        length=len(protein),
        sha256=hashlib.sha256(protein.sequence.encode()).hexdigest(),
        substituted=protein.substituted,
        gaps=protein.gaps,
    )


def _clean(record: FastaRecord, chains: Chains) -> CleanedProtein:
    """The cleaned protein of a record. Raises `SequenceError` for anything else, including prose."""
    complexes = may_be_complex(record.sequence) and chains()
    protein = clean_protein(record.sequence, record.place, chains=complexes)
    if looks_like_text(record.sequence):
        raise SequenceError(
            f"{record.place}: expected a protein, got letters in the proportions of a text "
            f"({record.sequence[:30]!r}); for texts use `longlens look` with a language model"
        )
    return protein
