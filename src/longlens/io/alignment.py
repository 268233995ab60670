"""Which residues of two sequences of one protein correspond: a model's input and the chain of a structure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError

# residues that BLOSUM62 lacks, as those that they replace
_NEAREST = str.maketrans("UOJ", "CKL")
# cells of the dynamic programme, which takes about a byte for each
CELLS = 10**9


def aligned_pairs(first: str, second: str) -> NDArray[np.int64]:
    """(M, 2): places in `first` and `second` that correspond, in order.

    Equal sequences, and one that is a part of the other, are recognised without an alignment. Otherwise a global
    alignment by BLOSUM62 with gap penalties 11 and 1, and none at the ends, decides (Biopython's `PairwiseAligner`).

    Raises:
        InputError: sequences so long that their alignment would not fit in memory.
    """
    short, long = sorted((first, second), key=len)
    start = long.find(short)
    if start >= 0 and long.find(short, start + 1) < 0:
        places = np.arange(len(short))
        pairs = np.stack([places, places + start], 1)
        return pairs if len(first) <= len(second) else pairs[:, ::-1]
    if len(first) * len(second) > CELLS:
        raise InputError(
            f"expected sequences of which one is a part of the other, or short enough to align, got {len(first):,} and "
            f"{len(second):,} residues; cut them to the part that they share"
        )
    from Bio.Align import PairwiseAligner, substitution_matrices

    aligner: Any = PairwiseAligner(mode="global")
    aligner.substitution_matrix = substitution_matrices.load("BLOSUM62")
    aligner.open_gap_score, aligner.extend_gap_score = -11, -1
    aligner.end_gap_score = 0
    best = aligner.align(first.translate(_NEAREST), second.translate(_NEAREST))[0]
    blocks = [
        np.stack([np.arange(*one), np.arange(*other)], 1) for one, other in zip(*best.aligned, strict=True)
    ]  # fmt: skip
    return np.concatenate(blocks) if blocks else np.empty((0, 2), np.int64)


def identity(pairs: NDArray[np.int64], first: str, second: str) -> float:
    """The share of equal residues among the aligned ones, but at least of half of the shorter sequence: a short stretch
    that happens to be alike is no identity. X is equal to anything."""
    equal = sum(first[i] == second[j] or "X" in (first[i], second[j]) for i, j in pairs.tolist())
    return equal / max(len(pairs), min(len(first), len(second)) / 2, 1)
