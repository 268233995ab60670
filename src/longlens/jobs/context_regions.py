"""The targets and the stretches that a user names: numbers, ranges, residues, words, and files of ranges (BED).

Numbers are those of tokens, as `longlens look` has them: a residue has its place in the protein, from 1, since the
start token is 0. Ranges are written with both ends, 10-20; in a BED file they count from 0, without the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from longlens.errors import InputError
from longlens.io.compression import read_bytes
from longlens.lens.deletion import Hideable, Span

# the most stretches of the default width, and the least width
MOST, NARROWEST = 64, 4


def default_width(tokens: int) -> int:
    """The width of stretches where none is given: 4, or as much as makes 64 of them."""
    return max(NARROWEST, -(-tokens // MOST))


def regular_spans(tokens: Sequence[int], width: int) -> list[Span]:
    """Stretches of `width` tokens side by side over a run of tokens; the last may be shorter."""
    first, last = tokens[0], tokens[-1] + 1
    return [(start, min(start + width, last)) for start in range(first, last, width)]


def parse_ranges(text: str, what: str) -> list[Span]:
    """ "10-20,40" -> [(10, 21), (40, 41)]. Raises `InputError`."""
    out = []
    for part in filter(None, (word.strip() for word in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise InputError(f"expected {what} as numbers and ranges such as 10-20,40-60, got {part!r}")
        start, stop = int(match[1]), int(match[2] or match[1])
        if stop < start:
            raise InputError(f"expected {what} with their first number first, got {part}")
        out.append((start, stop + 1))
    if not out:
        raise InputError(f"expected {what}, got none")
    return out


def read_bed(path: Path) -> dict[str, list[Span]]:
    """The ranges of each sequence in a BED file (columns: id, start from 0, end exclusive), as tokens of a protein.

    Raises `InputError`, with the line, for anything else.
    """
    out: dict[str, list[Span]] = {}
    for number, line in enumerate(read_bytes(path, str(path)).decode("utf-8", errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith(("#", "track", "browser")):
            continue
        cells = line.split()
        if len(cells) < 3 or not (cells[1].isdigit() and cells[2].isdigit()) or int(cells[1]) >= int(cells[2]):
            raise InputError(
                f"{path}, line {number}: expected an id, a start from 0 and a larger end, as BED has them, got {line!r}"
            )
        out.setdefault(cells[0], []).append((int(cells[1]) + 1, int(cells[2]) + 1))
    if not out:
        raise InputError(f"{path}: expected ranges in the columns of BED, got none")
    return out


def chosen_targets(subject: Hideable, words: Iterable[str], where: str) -> list[int]:
    """Tokens by number (27), range (10-20), residue (K27) or word of a text; each once, in order.

    Raises `InputError` for tokens that do not exist or are special, and for residues that are others.
    """
    out: dict[int, None] = {}
    for word in words:
        for target in _tokens_of(subject, word.strip(), where):
            if not 0 <= target < len(subject.labels):
                raise InputError(f"{where}: expected targets in {_extent(subject, predicted=True)}, got {word}")
            if subject.special[target]:
                raise InputError(
                    f"{where}: expected targets in {_extent(subject, predicted=True)}, got {word}, a start or end token"
                )
            if subject.causal and target == 0:
                raise InputError(f"{where}: expected targets from 1 on, got 0: nothing comes before the first token")
            out[target] = None
    if not out:
        raise InputError(f"{where}: expected at least one target, got none")
    return list(out)


def _tokens_of(subject: Hideable, word: str, where: str) -> list[int]:
    if re.fullmatch(r"\d+(-\d+)?", word):
        ((start, stop),) = parse_ranges(word, "targets")
        if stop > len(subject.labels) + 1:
            raise InputError(f"{where}: expected targets in {_extent(subject, predicted=True)}, got {word}")
        return list(range(start, stop))
    residue = re.fullmatch(r"([A-Za-z])(\d+)", word)
    if residue and (found := subject.find(word)):
        return found
    first = int(np.argmin(subject.special))
    if residue and 0 <= (place := int(residue[2]) - 1 + first) < len(subject.labels):
        label = subject.labels[place]
        if label == residue[1].upper():
            return [place]
        raise InputError(f"{where}: expected {residue[1].upper()} at {residue[2]}, as in {word}, found {label}")
    found = subject.find(word) if word else []
    if not found:
        raise InputError(
            f"{where}: expected a target as a number (27), a range (10-20), a residue with its number (K27) or a word "
            f"of the text, got {word!r}; tokens are {_extent(subject, predicted=True)}"
        )
    return found


def check_spans(subject: Hideable, spans: Sequence[Span], where: str) -> list[Span]:
    """The stretches, sorted, each once. Raises `InputError` for one that is not within the sequence's tokens."""
    for start, stop in spans:
        if not 0 <= start < stop <= len(subject.labels) or subject.special[start:stop].any():
            raise InputError(f"{where}: expected spans within {_extent(subject)}, got {start}-{stop - 1}")
    return sorted(set(spans))


def hidden_from(subject: Hideable, target: int, spans: Sequence[Span]) -> list[Span]:
    """The stretches, or their parts, that can be hidden from a target: under causality what lies before it.

    A stretch that is the target alone is left out: there is nothing else in it.
    """
    out = []
    for start, stop in spans:
        end = min(stop, target) if subject.causal else stop
        if start < end and (start, end) != (target, target + 1):
            out.append((start, end))
    return list(dict.fromkeys(out))


def _extent(subject: Hideable, *, predicted: bool = False) -> str:
    """The first and last token that is not special; `predicted`: of those that can be predicted."""
    places = [place for place, special in enumerate(subject.special) if not special]
    first = places[1] if predicted and subject.causal and places[0] == 0 and len(places) > 1 else places[0]
    return f"{first}-{places[-1]}"
