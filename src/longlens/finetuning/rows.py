"""Training rows for the models that are fitted at once: inputs, targets and weights of proteins or of residues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.finetuning.targets import Targets

# residues to which a probe is fitted at most; more are drawn evenly from all proteins
MOST_ROWS = 50_000


@dataclass(frozen=True)
class Rows:
    """Inputs (R, d), targets (R,) without NaN, a weight for each row, and the number of each row's protein."""

    inputs: NDArray[Any]
    truth: NDArray[np.float64]
    weights: NDArray[np.float64]
    proteins: NDArray[np.int64]


@dataclass(frozen=True)
class Vectors:
    """One array of vectors, a row for each protein or residue; `starts` (P + 1,) are the bounds of proteins in it."""

    array: NDArray[Any]
    starts: NDArray[np.int64]

    def of(self, protein: int) -> NDArray[Any]:
        """The rows of a protein."""
        return self.array[self.starts[protein] : self.starts[protein + 1]]


def gather(
    vectors: Vectors, targets: Targets, proteins: Sequence[int], class_weights: NDArray[np.float64], seed: int | None
) -> Rows:
    """The rows of proteins whose target is known. Rows of a protein weigh as much together as those of another, times
    their class's weight; the mean is 1. With `seed`, at most `MOST_ROWS`, the same share of every protein."""
    known = [np.flatnonzero(~np.isnan(targets.values[protein])) for protein in proteins]
    total = sum(map(len, known))
    if seed is not None and total > MOST_ROWS:
        generator, share = np.random.default_rng(seed), MOST_ROWS / total
        known = [
            np.sort(generator.permutation(places)[: max(1, int(len(places) * share))]) if len(places) else places
            for places in known
        ]
    inputs = np.concatenate(
        [np.asarray(vectors.of(protein)[places]) for protein, places in zip(proteins, known, strict=True)]
    )
    truth = np.concatenate([targets.values[protein][places] for protein, places in zip(proteins, known, strict=True)])
    weights = np.concatenate([np.full(len(places), 1 / max(1, len(places))) for places in known])
    if targets.task.classes:
        weights = weights * class_weights[truth.astype(np.int64)]
    owners = np.repeat(np.array(proteins, np.int64), [len(places) for places in known])
    return Rows(inputs, truth, weights * (len(weights) / weights.sum()), owners)
