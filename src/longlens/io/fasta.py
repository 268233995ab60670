"""Proteins from FASTA files, one record at a time."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from Bio.SeqIO.FastaIO import SimpleFastaParser

from longlens.errors import SequenceError

GZIP_MAGIC = b"\x1f\x8b"
STANDARD_INPUT = "standard input"


@dataclass(frozen=True)
class Record:
    """One entry of a FASTA file: `id` is the header's first word, `description` the rest, `number` counts from 1."""

    id: str
    description: str
    sequence: str
    source: str
    number: int

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.source}, record {self.number} ({self.id or 'no name'})"


def read_fasta(path: Path | str) -> Iterator[Record]:
    """Records of a FASTA file, plain or gzipped (told by its first bytes); "-" is standard input.

    Raises `SequenceError` for a file that cannot be read, is no FASTA, or ends inside its compression; records before
    the fault have been given by then.
    """
    # a copy of standard input stands for it
    name = STANDARD_INPUT if str(path) == "-" or Path(path).name == STANDARD_INPUT else str(path)
    try:
        with _open(path) as lines:
            first = _first_line(lines)
            if not first:
                return
            if not first.startswith(">"):
                raise SequenceError(f"{name}: expected FASTA, whose first line starts with '>', got {first[:40]!r}")
            chained = _Chained(first, lines)
            for number, (header, sequence) in enumerate(SimpleFastaParser(chained), 1):
                words = header.split(None, 1)
                yield Record(
                    id=words[0] if words else "",
                    description=words[1].strip() if len(words) > 1 else "",
                    sequence=sequence,
                    source=name,
                    number=number,
                )
    except FileNotFoundError:
        raise SequenceError(f"{name}: expected a FASTA file, found none") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SequenceError(
            f"{name}: its compressed data is cut off or broken ({error}); fetch the file again"
        ) from error
    except IsADirectoryError:
        raise SequenceError(f"{name}: expected a FASTA file, got a directory; name the files in it") from None
    except OSError as error:
        raise SequenceError(f"{name}: cannot be read ({error.strerror or error})") from error


@contextmanager
def _open(path: Path | str) -> Iterator[TextIO]:
    raw = sys.stdin.buffer if str(path) == "-" else Path(path).open("rb")  # noqa: SIM115
    try:
        buffered = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, raw))
        packed = buffered.peek(2)[:2] == GZIP_MAGIC
        stream = gzip.GzipFile(fileobj=buffered) if packed else buffered
        # headers come in any encoding, residues are ASCII: a bad byte in a header must not stop the work
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace")
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
