"""Labels of the tokens of a sequence for figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenLabels:
    """A sequence's name, its tokens' `labels`, and which of them are `special` (start, end, separators); `residues`
    says whether it is a protein.

    Tokens are counted from 0, including a start token. In a protein with a start token, the number of a residue (from
    1) is therefore the number of its token.
    """

    name: str
    labels: tuple[str, ...]
    special: NDArray[np.bool_]
    residues: bool

    def __len__(self) -> int:
        return len(self.labels)

    def caption(self, token: int) -> str:
        """The label of a token in figures: C22, or "truth (12)"."""
        label = self.labels[token]
        if self.special[token] and token in (0, len(self) - 1):
            return label
        return f"{label}{token}" if self.residues and not self.special[token] else f"{label} ({token})"
