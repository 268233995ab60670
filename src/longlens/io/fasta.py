"""Proteins from FASTA files, one record at a time."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from Bio.SeqIO.FastaIO import SimpleFastaParser

from longlens.errors import SequenceError, TruncatedInputError
from longlens.io.compression import READ_FAULTS, decompressed, is_broken

STANDARD_INPUT = "standard input"


@dataclass(frozen=True)
class FastaRecord:
    """One entry of a FASTA file: `id` is the header's first word, `description` the rest, `number` counts from 1."""

    id: str
    description: str
    sequence: str
    source: str
    number: int

    @property
    def place(self) -> str:
        """The file and number of the record, for messages."""
        return f"{self.source}, record {self.number} ({self.id or 'no name'})"


def read_fasta(path: Path | str) -> Iterator[FastaRecord]:
    """Records of a FASTA file, plain or compressed by gzip, bzip2 or xz (told by its first bytes); "-" is standard
    input.

    Raises `SequenceError` for a file that cannot be read or is not FASTA, and `TruncatedInputError` for one whose
    compressed data is cut off or broken. The latter says how many records came before; they have been yielded by then.
    """
    # messages name standard input, not the temporary copy of it
    name = STANDARD_INPUT if str(path) == "-" or Path(path).name == STANDARD_INPUT else str(path)
    last: FastaRecord | None = None
    residues = 0
    try:
        with _open(path, name) as lines:
            for last in _records(lines, name):
                residues += len(last.sequence)
                yield last
    except FileNotFoundError:
        raise SequenceError(f"{name}: expected a FASTA file, found no file of this name") from None
    except IsADirectoryError:
        raise SequenceError(f"{name}: expected a FASTA file, got a directory; name the files in it") from None
    except READ_FAULTS as error:
        if not is_broken(error):
            reason = getattr(error, "strerror", None) or error
            raise SequenceError(f"{name}: expected a FASTA file, it cannot be read ({reason})") from error
        records = last.number if last else 0
        before = f"after {records} whole records of {residues} residues, the last {last.id!r}" if last else "at once"
        raise TruncatedInputError(
            f"{name}: its compressed data is cut off or broken ({error}) {before}; every record after that is lost: "
            "fetch the file again",
            records=records, residues=residues,
        ) from error  # fmt: skip


def _records(lines: TextIO, name: str) -> Iterator[FastaRecord]:
    first = _first_line(lines)
    if not first:
        return
    if not first.startswith(">"):
        raise SequenceError(f"{name}: expected FASTA, whose first line starts with '>', got {first[:40]!r}")
    for number, (header, sequence) in enumerate(SimpleFastaParser(_Chained(first, lines)), 1):
        # a null byte would end the text in the files of results
        words = header.replace("\0", "\N{REPLACEMENT CHARACTER}").split(None, 1)
        yield FastaRecord(
            id=words[0] if words else "",
            description=words[1].strip() if len(words) > 1 else "",
            sequence=sequence,
            source=name,
            number=number,
        )


@contextmanager
def _open(path: Path | str, name: str) -> Iterator[TextIO]:
    raw = sys.stdin.buffer if str(path) == "-" else Path(path).open("rb")  # noqa: SIM115
    try:
        stream = decompressed(cast(BinaryIO, raw), name)
        # headers come in any encoding, residues are ASCII: a bad byte in a header must not stop the work
        yield io.TextIOWrapper(cast(io.BufferedReader, stream), encoding="utf-8-sig", errors="replace")
    finally:
        if raw is not sys.stdin.buffer:
            raw.close()


def _first_line(lines: TextIO) -> str:
    """The first line that is not blank; empty at the end."""
    for line in lines:
        if line.strip():
            return line
    return ""


class _Chained(Iterator[str]):
    """The first line, read already, and the rest."""

    def __init__(self, first: str, rest: TextIO) -> None:
        self._first: str | None = first
        self._rest = rest

    def __next__(self) -> str:
        if self._first is None:
            return next(self._rest)
        line, self._first = self._first, None
        return line
