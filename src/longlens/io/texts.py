"""Plain texts, and telling them from FASTA."""

from __future__ import annotations

import gzip
from pathlib import Path

from longlens.errors import SequenceError
from longlens.io.fasta import GZIP_MAGIC, STANDARD_INPUT


def looks_like_fasta(path: Path | str) -> bool:
    """Whether the first character that is not blank is ">". Raises `SequenceError` for a file that cannot be read."""
    return _read(path, 2**16).decode("utf-8-sig", errors="replace").lstrip()[:1] == ">"


def read_text(path: Path | str) -> str:
    """A file of UTF-8, plain or gzipped, without blanks around. Raises `SequenceError` for another or an empty one."""
    try:
        text = _read(path).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SequenceError(f"{_name(path)}: expected a text in UTF-8, got other bytes ({error})") from None
    if not text:
        raise SequenceError(f"{_name(path)}: expected a text, got an empty file")
    return text


def _read(path: Path | str, count: int = -1) -> bytes:
    try:
        with Path(path).open("rb") as file:
            packed = file.read(2) == GZIP_MAGIC
            file.seek(0)
            return (gzip.GzipFile(fileobj=file) if packed else file).read(count)
    except FileNotFoundError:
        raise SequenceError(f"{_name(path)}: expected a file, found none") from None
    except (OSError, EOFError) as error:
        raise SequenceError(f"{_name(path)}: cannot be read ({error})") from error


def _name(path: Path | str) -> str:
    # a copy of standard input stands for it
    return STANDARD_INPUT if Path(path).name == STANDARD_INPUT else str(path)
