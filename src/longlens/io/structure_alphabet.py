"""Tokens of a residue and of the structure around it (SaProt; Su et al. 2024, doi 10.1101/2023.10.01.560349).

A token is an amino acid and a letter of Foldseek's 3Di alphabet (van Kempen et al. 2024, doi
10.1038/s41587-023-01773-0), either of which may be unknown, `#`. A hidden residue is `#` with its structure left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from longlens.errors import SequenceError
from longlens.io.alphabet import RARE, STANDARD, Alphabet

UNKNOWN = "#"
RESIDUES = STANDARD + UNKNOWN
LETTERS = "pynwrqhgdlvtmfsaeikc" + UNKNOWN


@dataclass(frozen=True)
class StructureAlphabet(Alphabet):
    """Tokens `first + 21 a + s` for amino acid a of `RESIDUES` and structure letter s of `LETTERS`.

    `structures`: the letters of each sequence; None where no structure is known, so that all are `#`.
    """

    first: int = 5
    structures: Mapping[str, str] | None = field(default=None, compare=False)

    def with_structures(self, structures: Mapping[str, str]) -> StructureAlphabet:
        """The alphabet with the letters (`LETTERS`, lower case) of each cleaned sequence.

        Raises `SequenceError` for another number of letters than residues, or other letters.
        """
        for sequence, letters in structures.items():
            if len(letters) != len(sequence):
                raise SequenceError(
                    f"expected a structure letter for each residue, got {len(letters)} letters for {len(sequence)} "
                    f"residues, {sequence[:20]}..."
                )
            if other := set(letters) - set(LETTERS):
                raise SequenceError(f"expected structure letters of {LETTERS}, got {', '.join(sorted(other))}")
        return replace(self, structures=dict(structures))

    def number(self, token: str) -> int:
        """The number of a token; of a residue alone, its number with an unknown structure."""
        if len(token) == 1 and token in STANDARD + RARE:
            return self._token(token, UNKNOWN)
        return super().number(token)

    def encode(self, sequence: str) -> NDArray[np.int64]:
        """Start token, a token of residue and structure for each residue, end token.

        Raises `SequenceError` if structures are given and none is of this sequence.
        """
        tokens = super().encode(sequence)
        if self.structures is None:
            return tokens
        letters = self.structures.get(sequence)
        if letters is None:
            raise SequenceError(
                f"expected a sequence whose structure was given, got {sequence[:20]}..., {len(sequence)} residues; "
                "a variant has no structure of its own, so score variants by marginals"
            )
        tokens[self.residues(len(tokens))] += np.array([LETTERS.index(letter) for letter in letters]) - len(LETTERS) + 1
        return tokens

    def masked(self, token: int) -> int:
        return self.first + len(LETTERS) * (len(RESIDUES) - 1) + (token - self.first) % len(LETTERS)

    def by_residue(self, log_p: NDArray[np.float32]) -> NDArray[np.float32]:
        """The column of each residue (`number`) becomes the logarithm of the sum over its structure letters."""
        stop, width = self.first + len(RESIDUES) * len(LETTERS), len(LETTERS)
        pairs = log_p[:, self.first : stop].astype(np.float64).reshape(len(log_p), len(RESIDUES), width)
        out = log_p.copy()
        # the column of a residue with an unknown structure is the last of its 21
        out[:, self.first + width - 1 : stop : width] = np.logaddexp.reduce(pairs, -1)
        return out

    @property
    def settings(self) -> dict[str, str]:
        if self.structures is None:
            return super().settings
        digest = hashlib.sha256()
        for sequence, letters in sorted(self.structures.items()):
            digest.update(f"{sequence} {letters}\n".encode())
        return super().settings | {"structures": digest.hexdigest()}

    def _token(self, residue: str, letter: str) -> int:
        # a residue that is none of the 20 is unknown
        place = RESIDUES.index(residue if residue in STANDARD else UNKNOWN)
        return self.first + len(LETTERS) * place + LETTERS.index(letter)


def structure_tokens() -> tuple[str, ...]:
    """The tokens after the special ones, in order."""
    return tuple(f"{residue}{letter}" for residue in RESIDUES for letter in LETTERS)
