"""The proteins of a job, from FASTA files or from memory: a survey, and the sequences as often as they are needed."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeAlias, TypeVar

from longlens.errors import InputError, SequenceError
from longlens.io.alphabet import clean_protein, may_be_complex
from longlens.io.fasta import STANDARD_INPUT, FastaRecord
from longlens.io.survey import Chains, RecordInfo, Survey, make_survey, no_chains, read_cleaned, survey

W = TypeVar("W", str, int, "int | str")

Proteins: TypeAlias = str | Path | Sequence[str | Path] | Mapping[str, str]
"""A FASTA file, several, a sequence (one string is one protein), several, or sequences by id."""


class ProteinSource(ABC):
    """The sequences of a job: `survey` describes each, `sequences()` reads them from the start."""

    survey: Survey

    @abstractmethod
    def sequences(self) -> Iterator[str]:
        """The cleaned sequences of the survey's entries, in order."""


class FastaFiles(ProteinSource):
    """Files that are read twice: once for the survey, and again during the computation."""

    def __init__(self, paths: Sequence[Path | str], *, skip_errors: bool, chains: Chains = no_chains) -> None:
        self.paths, self.chains = paths, chains
        self.survey = survey(paths, skip_errors=skip_errors, chains=chains)

    def sequences(self) -> Iterator[str]:
        return read_cleaned(self.paths, skip_errors=bool(self.survey.skipped), chains=self.chains)


class InMemoryProteins(ProteinSource):
    """Sequences by id."""

    def __init__(self, records: Sequence[FastaRecord], *, skip_errors: bool, chains: Chains = no_chains) -> None:
        self.survey = make_survey(records, skip_errors=skip_errors, chains=chains)
        skipped = {record.number for record in self.survey.skipped}
        self._sequences = [
            clean_protein(
                record.sequence, record.place, chains=may_be_complex(record.sequence) and chains()
            ).sequence
            for record in records if record.number not in skipped
        ]  # fmt: skip

    def sequences(self) -> Iterator[str]:
        return iter(self._sequences)


class SelectedRecords(ProteinSource):
    """Only the records with some ids. Raises `InputError` for an id that does not occur."""

    def __init__(self, source: ProteinSource, ids: Collection[str]) -> None:
        entries = source.survey.entries
        # the broken rest of a file, with number 0, may have held any of them
        skipped = [record for record in source.survey.skipped if record.id in ids or record.number == 0]
        missing = sorted(set(ids) - {entry.id for entry in entries} - {record.id for record in skipped})
        if missing:
            lost = "".join(f"; {record.reason}" for record in skipped if record.number == 0)
            raise InputError(
                f"expected ids of records in the file, but no record has the id {', '.join(missing)}{lost}"
            )
        self._source = source
        self._places = [place for place, entry in enumerate(entries) if entry.id in ids]
        if not self._places:
            raise SequenceError(
                f"expected at least one of the records to be read; the first fault: {skipped[0].reason}"
            )
        self.survey = Survey(
            [entries[place] for place in self._places], skipped, source.survey.inputs,
            source.survey.warnings,
        )  # fmt: skip

    def sequences(self) -> Iterator[str]:
        every, at = self._source.sequences(), 0
        for place in self._places:
            yield next(islice(every, place - at, None), "")
            at = place + 1


class SequenceReader:
    """Sequences of a source by range. Ranges that advance are read once; going back reads from the start again."""

    def __init__(self, source: ProteinSource) -> None:
        self._source = source
        self._read: dict[int, str] = {}
        self._sequences = source.sequences()
        self._next = 0

    def take(self, first: int, last: int) -> list[str]:
        """Sequences first..last (exclusive). Raises `SequenceError` if one has changed since the survey."""
        entries = self._source.survey.entries
        self._read = {place: text for place, text in self._read.items() if first <= place < last}
        if first < self._next and any(place not in self._read for place in range(first, min(last, self._next))):
            self._sequences, self._next = self._source.sequences(), 0
        while self._next < last:
            text = next(self._sequences, "")
            if self._next >= first:
                _refuse_changed(text, entries[self._next])
                self._read[self._next] = text
            self._next += 1
        return [self._read[place] for place in range(first, last)]


def _refuse_changed(text: str, entry: RecordInfo) -> None:
    if hashlib.sha256(text.encode()).hexdigest() != entry.sha256:
        raise SequenceError(
            f"{entry.source}, record {entry.number} ({entry.id}): changed since the job began; give the file as it "
            "was, or another output folder"
        )


@contextmanager
def open_proteins(proteins: Proteins, *, on_error: str = "stop", chains: Chains = no_chains) -> Iterator[ProteinSource]:
    """The source that `proteins` names, surveyed. `chains`: whether complexes of several chains are taken.

    Raises `SequenceError` for records that cannot be read (with `on_error` "skip" the survey lists them), `InputError`
    for a string that is both a file and a protein.
    """
    if on_error not in ("stop", "skip"):
        raise InputError(f"expected on_error 'stop' or 'skip', got {on_error!r}")
    skip = on_error == "skip"
    if hasattr(proteins, "columns"):
        raise InputError(
            "expected FASTA files, sequences or sequences by id, got a data frame, whose items are the names of its "
            "columns; give dict(zip(frame['id'], frame['sequence']))"
        )
    if isinstance(proteins, Mapping):
        yield InMemoryProteins(_records(proteins.items()), skip_errors=skip, chains=chains)
        return
    listed = [proteins] if isinstance(proteins, str | Path) else list(proteins)
    if not listed:
        raise SequenceError("expected proteins, got an empty list")
    files = {is_file(item) for item in listed}
    if len(files) > 1:
        raise InputError("expected either paths of FASTA files or sequences, got both in one list")
    if files == {True}:
        with readable_twice(listed) as paths:
            yield FastaFiles(paths, skip_errors=skip, chains=chains)
        return
    texts = [str(item) for item in listed]
    records = _records((str(number), text) for number, text in enumerate(texts, 1))
    yield InMemoryProteins(records, skip_errors=skip, chains=chains)


def is_file(item: str | Path) -> bool:
    """Whether an item is a FASTA file ("-" is standard input) and not a sequence.

    A string is a file if one of that name exists, or if it has a suffix or a path separator. Raises `InputError` if a
    file exists whose name is also a protein.
    """
    if isinstance(item, Path) or item == "-":
        return True
    if item == "":
        # an empty protein, which is refused as such, and not the current folder
        return False
    if not isinstance(item, str):
        raise InputError(f"expected paths of FASTA files or sequences as strings, got {type(item).__name__}")
    looks_like_path = re.fullmatch(r"\.\w+", Path(item).suffix) is not None or "/" in item or "\\" in item
    try:
        exists = "\n" not in item and Path(item).exists()
    except OSError:
        # longer than the name of a file can be
        exists = False
    if exists and not looks_like_path:
        try:
            clean_protein(item)
        except SequenceError:
            return True
        raise InputError(
            f"{item!r} is both a file in this folder and a protein; give pathlib.Path({item!r}) for the file, or "
            f"{{'name': {item!r}}} for the protein"
        )
    return exists or looks_like_path


def _records(items: Iterable[tuple[str, str]]) -> list[FastaRecord]:
    records = []
    for number, (name, text) in enumerate(items, 1):
        if not isinstance(text, str):
            raise InputError(f"expected sequences as strings, got {type(text).__name__} for {name!r}")
        records.append(FastaRecord(id=str(name), description="", sequence=text, source="sequences", number=number))
    return records


def as_words(value: W | Iterable[W]) -> tuple[W, ...]:
    """One item or several, as a list."""
    return (value,) if isinstance(value, str | int) else tuple(value)


@contextmanager
def readable_twice(paths: Sequence[str | Path]) -> Iterator[list[str | Path]]:
    """The paths as files that can be read twice: standard input ("-") is copied to a temporary file."""
    if "-" not in map(str, paths):
        yield list(paths)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / STANDARD_INPUT
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield [copy if str(path) == "-" else path for path in paths]
