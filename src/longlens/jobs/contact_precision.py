"""How precise predicted contacts are: of the L strongest pairs of a protein of L residues, the share in contact.

The field's measure (CASP; Rao et al. 2020), for samples of pairs and for proteins that were held out of the fit. For
pairs with equal scores the precision is the expectation over all their orders, so that scores without information give
the share of contacts, whatever the order of the pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# the most parts into which proteins are divided, each predicted from the others
FOLDS = 5
# pairs this far apart are long-range (CASP)
LONG_RANGE = 24
# proteins that share this part of the shorter one's words of residues count as alike
WORD, ALIKE = 5, 0.3


@dataclass(frozen=True)
class Precision:
    """Of the L strongest pairs at least `separation` apart: mean over proteins, and the lowest and highest of them.

    `chance` is the mean share of contacts among all such pairs, which is the precision of a random guess.
    """

    separation: int
    mean: float
    lowest: float
    highest: float
    chance: float
    proteins: int


@dataclass(frozen=True)
class ScoredPairs:
    """A protein's sampled pairs: `pairs` (M, 2), whether each is in contact (`truth`), how many pairs of the protein
    each stands for (`weights`), and its predicted `scores`; `length` in residues."""

    length: int
    pairs: NDArray[np.int64]
    truth: NDArray[np.bool_]
    weights: NDArray[np.float64]
    scores: NDArray[np.float64]


def expected_precision(
    scores: NDArray[np.float64], truth: NDArray[np.bool_], weights: NDArray[np.float64], count: float
) -> float:
    """Share of contacts among the `count` strongest pairs, expected over the orders of equal scores.

    A sampled pair counts as the `weights` pairs that it represents; the pairs with the score at which `count` is
    reached all count by the same fraction.
    """
    count = min(float(count), float(weights.sum()))
    if count <= 0:
        return 0.0
    _, group = np.unique(-scores, return_inverse=True)
    total = np.bincount(group, weights=weights)
    contacts = np.bincount(group, weights=weights * truth)
    before = np.concatenate([[0.0], np.cumsum(total)[:-1]])
    part = np.clip((count - before) / total, 0.0, 1.0)
    return float((contacts * part).sum() / count)


def measure_precision(proteins: Sequence[ScoredPairs], separation: int) -> Precision | None:
    """The precision of proteins that have contacts at least `separation` apart; None if there is no such protein."""
    values, chances = [], []
    for protein in proteins:
        far = protein.pairs[:, 1] - protein.pairs[:, 0] >= separation
        truth, weights = protein.truth[far], protein.weights[far]
        if truth.any():
            values.append(expected_precision(protein.scores[far], truth, weights, protein.length))
            chances.append(float(weights[truth].sum() / weights.sum()))
    if not values:
        return None
    return Precision(separation, float(np.mean(values)), min(values), max(values), float(np.mean(chances)), len(values))


def similar_groups(sequences: Sequence[str]) -> list[int]:
    """A group number for each protein; nearly identical ones, such as the chains of a homodimer, share a number.

    Two proteins are alike if more than `ALIKE` of the shorter one's words of `WORD` residues occur in the other (about
    80 % identity). Distant relatives are not recognised: remove them from the sample beforehand if necessary.
    """
    words = [{text[i : i + WORD] for i in range(len(text) - WORD + 1)} for text in sequences]
    group = list(range(len(sequences)))
    for i in range(len(sequences)):
        for j in range(i):
            alike = len(words[i] & words[j]) > ALIKE * min(len(words[i]), len(words[j]))
            if group[i] != group[j] and (alike or sequences[i] == sequences[j]):
                old, new = group[i], group[j]
                group = [new if number == old else number for number in group]
    return group


def held_out_folds(groups: Sequence[int], seed: int) -> Iterator[NDArray[np.bool_]]:
    """Which proteins to hold out, at most `FOLDS` times; each protein once, with those of its group.

    No folds if all proteins are of one group, since nothing remains to fit to.
    """
    numbers = np.array(groups)
    distinct = np.random.default_rng(seed).permutation(np.unique(numbers))
    folds = min(FOLDS, len(distinct))
    if folds >= 2:
        for fold in range(folds):
            yield np.isin(numbers, distinct[fold::folds])
