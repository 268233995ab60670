"""Residues and tokens: cleaning a protein sequence, and numbering its residues one for one."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from longlens.errors import SequenceError

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
# selenocysteine, pyrrolysine, and the ambiguous ones: D or N, E or Q, any
RARE = "UOBZX"
GAPS = "-."

_KEPT = frozenset(STANDARD + RARE)
_DROP_BLANKS = str.maketrans("", "", string.whitespace)


@dataclass(frozen=True)
class Protein:
    """A cleaned sequence and what cleaning did to it.

    `substituted` residues became X (J and inner stops), `gaps` were dropped; a trailing stop is dropped uncounted.
    """

    sequence: str
    substituted: int = 0
    gaps: int = 0

    def __len__(self) -> int:
        return len(self.sequence)


def clean_protein(raw: str, record: str = "the sequence") -> Protein:
    """Upper case, without blanks, gaps and trailing stops, J and inner stops as X.

    Raises `SequenceError` for an empty sequence and for any other character; the message names `record`, the position
    (from 1, blanks not counted) and the character.
    """
    letters = raw.translate(_DROP_BLANKS)
    sequence = letters.upper() if letters.isascii() else letters
    unknown = set(sequence) - _KEPT
    substituted = gaps = 0
    if unknown:
        gaps = sum(map(sequence.count, GAPS))
        # gaps may stand after the stop
        sequence = sequence.translate(str.maketrans("", "", GAPS)).rstrip("*")
        substituted = sequence.count("J") + sequence.count("*")
        sequence = sequence.translate(str.maketrans("J*", "XX"))
        for character in unknown - set("J*" + GAPS):
            if character in sequence:
                _refuse(letters, record)
    if not sequence:
        raise SequenceError(f"{record}: expected at least one residue, got none; remove the record or skip it")
    return Protein(sequence, substituted, gaps)


def _refuse(letters: str, record: str) -> None:
    known = _KEPT | set("J*" + GAPS)
    place, character = next(
        (place, c) for place, c in enumerate(letters, 1) if not c.isascii() or c.upper() not in known
    )
    hint = "; split a complex into its chains, one record each" if character == ":" else ""
    raise SequenceError(
        f"{record}: expected amino acids ({STANDARD}{RARE}, J, *), got {character!r} at position {place}{hint}"
    )


@dataclass(frozen=True)
class Alphabet:
    """A model's tokens in order, and the numbers of those with a meaning of their own."""

    tokens: tuple[str, ...]
    start: int
    end: int
    mask: int
    unknown: int
    pad: int = field(default=0)

    def __len__(self) -> int:
        return len(self.tokens)

    def number(self, token: str) -> int:
        """The number of a token; that of `unknown` where the model has none."""
        return self._numbers.get(token, self.unknown)

    def encode(self, sequence: str) -> NDArray[np.int64]:
        """Start, one token per residue, end: (len + 2,). `sequence` is cleaned (`clean_protein`)."""
        out = np.empty(len(sequence) + 2, dtype=np.int64)
        out[0], out[-1] = self.start, self.end
        out[1:-1] = self._table[np.frombuffer(sequence.encode("ascii"), dtype=np.uint8)]
        return out

    def decode(self, numbers: NDArray[np.int64]) -> str:
        """The tokens' names, joined."""
        return "".join(self.tokens[number] for number in numbers)

    @property
    def standard(self) -> NDArray[np.int64]:
        """The numbers of the 20 standard residues, in the order of `STANDARD`."""
        return self._table[np.frombuffer(STANDARD.encode(), dtype=np.uint8)]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        """Token number of each ASCII code."""
        return np.array([self._numbers.get(chr(code), self.unknown) for code in range(128)], dtype=np.int64)


ESM = Alphabet(
    tokens=(
        *("<cls>", "<pad>", "<eos>", "<unk>"), *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>",
    ),
    start=0, pad=1, end=2, unknown=3, mask=32,
)  # fmt: skip
"""ESM-1b's and ESM-2's alphabet (Lin et al. 2023)."""
