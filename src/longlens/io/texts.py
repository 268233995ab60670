"""Reading plain texts, and distinguishing them from FASTA."""

from __future__ import annotations

import re
from pathlib import Path

from longlens.errors import SequenceError
from longlens.io.alphabet import looks_like_text
from longlens.io.compression import read_bytes
from longlens.io.fasta import STANDARD_INPUT

# letters of a text so short that their frequencies tell nothing
SHORT = 20


def looks_like_fasta(path: Path | str) -> bool:
    """Whether this begins with a record of FASTA: a line with ">", and a sequence below it that is not prose.

    Quoted mail and block quotes begin with ">" too: they have prose below it, or nothing but lines that begin with
    "> " or ">>". A guess, where a quote is followed by a single word.

    Raises `SequenceError` if the file cannot be read.
    """
    # few bytes, since a file that is cut off can be read up to there
    text = read_bytes(path, _name(path), 2**12).decode("utf-8-sig", errors="replace").lstrip()
    if not text.startswith(">"):
        return False
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    quoted = [line.startswith(">") for line in lines]
    if all(quoted):
        return not any(re.match(r">(\s|>|$)", line) for line in lines)
    first = quoted.index(False)
    below = quoted[first:].index(True) if True in quoted[first:] else len(lines)
    return not _is_prose("\n".join(lines[first : first + below]))


def _is_prose(text: str) -> bool:
    """Whether this is prose, however short, and not a sequence."""
    if looks_like_text(text) or re.search(r"[a-z][,;:!?](\s|$)", text):
        return True
    letters = sum(character.isalpha() for character in text)
    return len(text.split()) > 1 and letters < SHORT and any(character.islower() for character in text)


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file, plain or compressed, as it is.

    Raises `SequenceError` for another encoding or bytes of 0, an empty file, or one that cannot be read.
    """
    try:
        text = read_bytes(path, _name(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SequenceError(f"{_name(path)}: expected a text in UTF-8, got other bytes ({error})") from None
    if not text.strip():
        raise SequenceError(f"{_name(path)}: expected a text, got an empty file")
    if "\0" in text:
        raise SequenceError(f"{_name(path)}: expected a text in UTF-8, got bytes of 0, as other files have them")
    return text


def _name(path: Path | str) -> str:
    # messages name standard input, not the temporary copy of it
    return STANDARD_INPUT if Path(path).name == STANDARD_INPUT else str(path)
