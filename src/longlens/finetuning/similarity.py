"""Which proteins are alike: shared words as a filter, then alignment; greedy clusters; the nearest training protein.

Identity is the share of the shorter sequence's residues that are identical in the best local alignment (Smith &
Waterman 1981; BLOSUM62, gaps 11 and 1), by Biopython. Two kinds of pairs count as unlike: those that share fewer than
`SHARED` words of `WORD` residues, which are not aligned (as in CD-HIT: Li & Godzik 2006); and those whose alignment is
no better than chance, expected `CHANCE` times or more among random sequences of these lengths (Karlin & Altschul 1990,
with BLAST's constants for these scores), since short random sequences reach 30 % in some local alignment.

For pairs of more than `CELLS` cells, whose alignment would take memory quadratic in the length, identity is estimated
from the share c of common words as c^(1/WORD) (Ondov et al. 2016, on the Mash distance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD, SHARED = 5, 2
CELLS = 2**24
# lambda and K of gapped alignments with these scores (BLAST), and the expected number below which one is no chance
LAMBDA, K, CHANCE = 0.267, 0.041, 1e-3
# candidates of one protein that are aligned, those with the most shared words first
MOST = 50


@dataclass(frozen=True)
class Neighbour:
    """The nearest protein of a set: its number (-1: none shares words), and identity 0..1."""

    number: int
    identity: float


def words(sequence: str) -> NDArray[np.int64]:
    """The distinct words of a sequence as sorted numbers."""
    codes = np.frombuffer(sequence.encode("ascii"), np.uint8).astype(np.int64) - 65
    count = len(codes) - WORD + 1
    if count < 1:
        return np.empty(0, np.int64)
    numbers = np.zeros(count, np.int64)
    for place in range(WORD):
        numbers = numbers * 26 + codes[place : place + count]
    return np.unique(numbers)


class WordIndex:
    """Finds the proteins that share words with another."""

    def __init__(self) -> None:
        self._holders: dict[int, list[int]] = {}
        self.words: dict[int, NDArray[np.int64]] = {}

    def add(self, number: int, own: NDArray[np.int64]) -> None:
        """Add the words of protein `number`."""
        self.words[number] = own
        for word in own.tolist():
            self._holders.setdefault(word, []).append(number)

    def candidates(self, own: NDArray[np.int64]) -> list[int]:
        """Proteins with enough words in common, those with most first (then in order of their numbers)."""
        holders = [number for word in own.tolist() for number in self._holders.get(word, ())]
        numbers, shared = np.unique(np.array(holders, np.int64), return_counts=True)
        needed = [min(SHARED, len(own), len(self.words[number])) for number in numbers.tolist()]
        enough = shared >= np.array(needed, np.int64)
        numbers, shared = numbers[enough], shared[enough]
        return numbers[np.argsort(-shared, kind="stable")].tolist()[:MOST]


@cache
def _aligner() -> Any:
    from Bio.Align import PairwiseAligner, substitution_matrices

    matrix = substitution_matrices.load("BLOSUM62")
    return PairwiseAligner(mode="local", substitution_matrix=matrix, open_gap_score=-11, extend_gap_score=-1)


def _known_letters(sequence: str) -> str:
    # selenocysteine and pyrrolysine are not in BLOSUM62
    return sequence.replace("U", "C").replace("O", "K")


def aligned_pairs(a: str, b: str) -> NDArray[np.int64]:
    """(M, 2): the residues of `a` and `b` (from 0) that the best local alignment puts together; none where
    it is no better than chance."""
    alignments = _aligner().align(_known_letters(a), _known_letters(b))
    if K * len(a) * len(b) * math.exp(-LAMBDA * alignments.score) >= CHANCE:
        return np.empty((0, 2), np.int64)
    blocks = alignments[0].aligned
    parts = [np.stack([np.arange(*one), np.arange(*two)], 1) for one, two in zip(*blocks, strict=True)]
    return np.concatenate(parts).astype(np.int64)


def can_align(a: str, b: str) -> bool:
    """Whether the alignment of two sequences is small enough to be made."""
    return len(a) * len(b) <= CELLS


def identity(a: str, b: str) -> float:
    """The share of the shorter sequence that is identical in the other, 0..1; see the module for what is estimated."""
    if a == b:
        return 1.0
    if can_align(a, b):
        pairs = aligned_pairs(a, b)
        one, two = (np.frombuffer(text.encode("ascii"), np.uint8) for text in (a, b))
        return float((one[pairs[:, 0]] == two[pairs[:, 1]]).sum()) / min(len(a), len(b))
    first, second = words(a), words(b)
    common = len(np.intersect1d(first, second, assume_unique=True))
    return float((common / max(1, min(len(first), len(second)))) ** (1 / WORD))


def greedy_clusters(
    sequences: Sequence[str], threshold: float, step: Callable[[int], None] = lambda done: None
) -> NDArray[np.int64]:
    """(P,): the number of the protein that represents each one's cluster.

    The longest protein first; each joins the cluster of the representative with most shared words to which it has at
    least `threshold` identity, or begins a cluster. Two members of different clusters may still be alike: see
    `nearest`.
    """
    clusters = np.arange(len(sequences))
    index, same = WordIndex(), dict[str, int]()
    order = sorted(range(len(sequences)), key=lambda number: (-len(sequences[number]), number))
    for done, number in enumerate(order, 1):
        sequence = sequences[number]
        if sequence in same:
            clusters[number] = clusters[same[sequence]]
            continue
        same[sequence] = number
        own = words(sequence)
        alike = (other for other in index.candidates(own) if identity(sequence, sequences[other]) >= threshold)
        representative = next(alike, None)
        if representative is None:
            index.add(number, own)
        else:
            clusters[number] = representative
        step(done)
    return clusters


def nearest(
    sequences: Sequence[str],
    queries: Sequence[int],
    training: Sequence[int],
    step: Callable[[int], None] = lambda done: None,
) -> list[Neighbour]:
    """For each of `queries` the most alike of `training`, both numbers of `sequences`."""
    index = WordIndex()
    same = {sequences[number]: number for number in reversed(list(training))}
    for number in training:
        index.add(number, words(sequences[number]))
    found = []
    for done, query in enumerate(queries, 1):
        sequence, best = sequences[query], Neighbour(-1, 0.0)
        if sequence in same:
            best = Neighbour(same[sequence], 1.0)
        else:
            for other in index.candidates(words(sequence)):
                share = identity(sequence, sequences[other])
                if share > best.identity:
                    best = Neighbour(other, share)
        found.append(best)
        step(done)
    return found
