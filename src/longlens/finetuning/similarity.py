"""Which proteins are alike: shared words as a filter, then alignment; greedy clusters; the nearest training protein.

Identity is the share of the shorter sequence's residues that are identical in the best local alignment (Smith &
Waterman 1981; BLOSUM62, gaps 11 and 1), by Biopython. Two kinds of pairs count as unlike: those whose alignment is no
better than chance, expected `CHANCE` times or more among random sequences of these lengths (Karlin & Altschul 1990,
with BLAST's constants for these scores), since short random sequences reach 30 % in some local alignment; and those
that the filter leaves out, which are not aligned. The filter counts the words of `WORD` residues that two proteins
share near one diagonal, and asks for more than random sequences have.

For pairs of more than `CELLS` cells, whose traced alignment would take memory quadratic in the length, the score alone
is computed, in linear memory, and identity is estimated from it: see `estimated_identity`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD, BAND = 3, 8
# how often two words of random proteins are the same (residue frequencies of UniProtKB/Swiss-Prot)
SAME = 1 / 4870
CELLS = 2**24
# lambda and K of gapped alignments with these scores (BLAST), and the expected number below which one is no chance
LAMBDA, K, CHANCE = 0.267, 0.041, 1e-3
# candidates of one protein that are aligned, those with the most shared words first
MOST = 50
_SHIFT = 32


@dataclass(frozen=True)
class Neighbour:
    """The nearest protein of a set: its number (-1: none is alike), and identity 0..1."""

    number: int
    identity: float


def words(sequence: str) -> NDArray[np.int64]:
    """The words of a sequence as numbers, one for each place where one begins."""
    codes = np.frombuffer(sequence.encode("ascii"), np.uint8).astype(np.int64) - 65
    count = max(0, len(codes) - WORD + 1)
    numbers = np.zeros(count, np.int64)
    for place in range(WORD):
        numbers = numbers * 26 + codes[place : place + count]
    return numbers


class WordIndex:
    """Finds the proteins that share words with another near one diagonal."""

    def __init__(self) -> None:
        # word -> number and place of each occurrence, as one integer
        self._holders: dict[int, array[int]] = {}
        self._lengths: dict[int, int] = {}

    def add(self, number: int, sequence: str) -> None:
        """Add the words of protein `number`."""
        self._lengths[number] = len(sequence)
        for place, word in enumerate(words(sequence).tolist()):
            self._holders.setdefault(word, array("q")).append((number << _SHIFT) + place)

    def candidates(self, sequence: str) -> list[int]:
        """Proteins with enough words in common, those with most first (then in order of their numbers)."""
        holders, places = [], []
        for place, word in enumerate(words(sequence).tolist()):
            found = self._holders.get(word)
            if found is not None:
                holders.append(np.frombuffer(found, np.int64).copy())
                places.append(np.full(len(found), place))
        if not holders:
            return []
        held = np.concatenate(holders)
        numbers, diagonals = held >> _SHIFT, (held & ((1 << _SHIFT) - 1)) - np.concatenate(places) + len(sequence)
        best: dict[int, int] = {}
        # bands that overlap by half, so that a diagonal at the border of one is in the middle of another
        for offset in (0, BAND // 2):
            bands, counts = np.unique((numbers << _SHIFT) + (diagonals + offset) // BAND, return_counts=True)
            several = counts > 1
            for number, count in zip((bands[several] >> _SHIFT).tolist(), counts[several].tolist(), strict=True):
                best[number] = max(best.get(number, 0), count)
        enough = [number for number, count in best.items() if count >= self._needed(len(sequence), number)]
        return sorted(enough, key=lambda number: (-best[number], number))[:MOST]

    def _needed(self, length: int, number: int) -> int:
        """Words in a band that about one random pair in a hundred shares, and most proteins of 30 % identity."""
        mean_length = 2 * length * self._lengths[number] / (length + self._lengths[number])
        chance = mean_length / 2 * BAND * SAME
        return math.ceil(max(2 + min(mean_length, 600) / 90, chance + 7 * math.sqrt(chance)))


@cache
def _aligner() -> Any:
    from Bio.Align import PairwiseAligner, substitution_matrices

    matrix = substitution_matrices.load("BLOSUM62")
    return PairwiseAligner(mode="local", substitution_matrix=matrix, open_gap_score=-11, extend_gap_score=-1)


def _known_letters(sequence: str) -> str:
    # selenocysteine and pyrrolysine are not in BLOSUM62
    return sequence.replace("U", "C").replace("O", "K")


def local_pairs(a: str, b: str) -> NDArray[np.int64]:
    """(M, 2): the residues of `a` and `b` (from 0) that the best local alignment puts together; none where
    it is no better than chance."""
    first, second = _known_letters(a), _known_letters(b)
    # the score alone takes a tenth of the time
    if _by_chance(float(_aligner().score(first, second)), len(a), len(b)):
        return np.empty((0, 2), np.int64)
    blocks = _aligner().align(first, second)[0].aligned
    parts = [np.stack([np.arange(*one), np.arange(*two)], 1) for one, two in zip(*blocks, strict=True)]
    return np.concatenate(parts).astype(np.int64)


def can_align(a: str, b: str) -> bool:
    """Whether the alignment of two sequences is small enough to be traced."""
    return len(a) * len(b) <= CELLS


def local_identity(a: str, b: str) -> float:
    """The share of the shorter sequence that is identical in the other, 0..1; estimated for long pairs."""
    if a == b:
        return 1.0
    if not can_align(a, b):
        return estimated_identity(a, b)
    pairs = local_pairs(a, b)
    one, two = (np.frombuffer(text.encode("ascii"), np.uint8) for text in (a, b))
    return float((one[pairs[:, 0]] == two[pairs[:, 1]]).sum()) / min(len(a), len(b))


def estimated_identity(a: str, b: str) -> float:
    """Identity from the score alone, in linear memory: (S / n + 1) / (p + 1), for n residues of the shorter sequence
    whose score with itself is p n, since residues that differ score -1 on average. Each gap makes it a little lower
    (0.1 where 4 % of the residues are inserted or deleted); where only a part of the shorter sequence aligns, it is too
    high, by 0.16 at most."""
    short = min(_known_letters(a), _known_letters(b), key=len)
    score = float(_aligner().score(_known_letters(a), _known_letters(b)))
    if _by_chance(score, len(a), len(b)):
        return 0.0
    own = {letter: float(_aligner().substitution_matrix[letter, letter]) for letter in set(short)}
    with_itself = sum(own[letter] for letter in short) / len(short)
    return max(0.0, min(1.0, (score / len(short) + 1) / (with_itself + 1)))


def _by_chance(score: float, first: int, second: int) -> bool:
    return K * first * second * math.exp(-LAMBDA * score) >= CHANCE


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
        alike = (
            other for other in index.candidates(sequence) if local_identity(sequence, sequences[other]) >= threshold
        )
        representative = next(alike, None)
        if representative is None:
            index.add(number, sequence)
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
        index.add(number, sequences[number])
    found = []
    for done, query in enumerate(queries, 1):
        sequence, best = sequences[query], Neighbour(-1, 0.0)
        if sequence in same:
            best = Neighbour(same[sequence], 1.0)
        else:
            for other in index.candidates(sequence):
                share = local_identity(sequence, sequences[other])
                if share > best.identity:
                    best = Neighbour(other, share)
        found.append(best)
        step(done)
    return found
