"""Reading plain texts, and distinguishing them from FASTA."""

from __future__ import annotations

from pathlib import Path

from longlens.errors import SequenceError
from longlens.io.compression import read_bytes
from longlens.io.fasta import STANDARD_INPUT


def looks_like_fasta(path: Path | str) -> bool:
    """Whether the first character that is not blank is ">". Raises `SequenceError` if the file cannot be read."""
    # few bytes, since a file that is cut off can be read up to there
    return read_bytes(path, _name(path), 2**12).decode("utf-8-sig", errors="replace").lstrip()[:1] == ">"


def read_text(path: Path | str, *, strip: bool = True) -> str:
    """The text of a UTF-8 file, plain or compressed; `strip`: without blanks around it.

    Raises `SequenceError` for another encoding, an empty file, or one that cannot be read.
    """
    try:
        text = read_bytes(path, _name(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SequenceError(f"{_name(path)}: expected a text in UTF-8, got other bytes ({error})") from None
    if not text.strip():
        raise SequenceError(f"{_name(path)}: expected a text, got an empty file")
    return text.strip() if strip else text


def _name(path: Path | str) -> str:
    # messages name standard input, not the temporary copy of it
    return STANDARD_INPUT if Path(path).name == STANDARD_INPUT else str(path)
