"""The tokens of a sequence, and how a figure names them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenLabels:
    """A sequence's name, its tokens' `labels`, and which of them are `special` (start, end, separators); `residues`
    says whether it is a protein.

    Tokens are counted from 0. A token that marks a start is a token as others are, so that in a protein that begins
    with one, a residue's number (from 1) is its token's.
    """

    name: str
    labels: tuple[str, ...]
    special: NDArray[np.bool_]
    residues: bool

    def __len__(self) -> int:
        return len(self.labels)

    def caption(self, token: int) -> str:
        """How a figure names a token: C22, or "truth (12)"."""
        label = self.labels[token]
        if self.special[token] and token in (0, len(self) - 1):
            return label
        return f"{label}{token}" if self.residues and not self.special[token] else f"{label} ({token})"
