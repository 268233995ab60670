"""Measures of predictions, with intervals by the bootstrap over clusters of similar proteins.

Each measure takes a weight for each row: a bootstrap sample draws clusters with replacement (Efron & Tibshirani 1993,
chapter 8), which weights each row by how often its cluster was drawn, so that values are sorted only once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longlens.finetuning.targets import Targets

SAMPLES = 1000
Floats = NDArray[np.float64]
Measure = Callable[[Floats], float]


@dataclass(frozen=True)
class Measured:
    """A measure, and the 95 % interval of bootstrap samples (None where there is a single cluster)."""

    value: float
    low: float | None
    high: float | None


def spearman(truth: Floats, scores: Floats) -> Measure:
    """Spearman's rank correlation, ties by their mean rank; NaN where either is constant."""
    groups = [np.unique(values, return_inverse=True)[1] for values in (truth, scores)]

    def measure(weights: Floats) -> float:
        ranks = []
        for group in groups:
            total = np.bincount(group, weights=weights)
            ranks.append((np.cumsum(total) - total / 2)[group])
        one, two = (rank - np.average(rank, weights=weights) for rank in ranks)
        spread = (weights * one**2).sum() * (weights * two**2).sum()
        return float((weights * one * two).sum() / np.sqrt(spread)) if spread > 1e-12 else float("nan")

    return measure


def rmse(truth: Floats, scores: Floats) -> Measure:
    """Root of the mean squared error."""
    errors = (truth - scores) ** 2
    return lambda weights: float(np.sqrt((weights * errors).sum() / weights.sum()))


def average_precision(positive: NDArray[np.bool_], scores: Floats) -> Measure:
    """Area under precision and recall as the sum of steps (average precision), equal scores together; NaN without
    positives."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))

    def measure(weights: Floats) -> float:
        every, hits = weights[order], (weights * positive)[order]
        found = np.cumsum(hits)[ends]
        seen = np.cumsum(every)[ends]
        if not len(found) or found[-1] <= 0:
            return float("nan")
        return float((np.diff(found, prepend=0.0) * found / np.maximum(seen, 1e-12)).sum() / found[-1])

    return measure


def confusion(truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int, weights: Floats) -> Floats:
    """(C, C): weight of the rows of each true (row) and predicted (column) class."""
    counts = np.bincount(truth * classes + predicted, weights=weights, minlength=classes**2).astype(np.float64)
    return counts.reshape(classes, classes)


def matthews(matrix: Floats) -> float:
    """Matthews' correlation coefficient for any number of classes (Gorodkin 2004); 0 where it is not defined."""
    total, right = matrix.sum(), np.trace(matrix)
    true, predicted = matrix.sum(1), matrix.sum(0)
    spread = (total**2 - (true**2).sum()) * (total**2 - (predicted**2).sum())
    return float((right * total - (true * predicted).sum()) / np.sqrt(spread)) if spread > 0 else 0.0


def macro_f1(matrix: Floats) -> float:
    """The mean of F1 over the classes that occur or are predicted."""
    both = matrix.sum(0) + matrix.sum(1)
    return float((2 * np.diag(matrix)[both > 0] / both[both > 0]).mean())


def accuracy(matrix: Floats) -> float:
    """The share of rows whose class is right."""
    return float(np.trace(matrix) / matrix.sum())


def measures(targets: Targets, truth: Floats, outputs: Floats, predicted: Floats) -> dict[str, Measure]:
    """The measures of a task. `truth` (R,), `outputs` (R, C) probabilities or (R, 1) values, `predicted` (R,)."""
    if not targets.task.classes:
        return {"spearman": spearman(truth, outputs[:, 0]), "rmse": rmse(truth, outputs[:, 0])}
    classes = len(targets.classes)
    true, chosen = truth.astype(np.int64), predicted.astype(np.int64)

    def of_matrix(measure: Callable[[Floats], float]) -> Measure:
        return lambda weights: measure(confusion(true, chosen, classes, weights))

    # of two classes, the second is the one that is looked for
    looked_for = [1] if classes == 2 else range(classes)
    curves = [average_precision(true == number, outputs[:, number]) for number in looked_for]

    def pr_auc(weights: Floats) -> float:
        areas = np.array([curve(weights) for curve in curves])
        return float(np.nanmean(areas)) if not np.isnan(areas).all() else float("nan")

    return {"mcc": of_matrix(matthews), "macro_f1": of_matrix(macro_f1), "pr_auc": pr_auc,
            "accuracy": of_matrix(accuracy)}  # fmt: skip


def measure_all(
    targets: Targets, truth: Floats, outputs: Floats, predicted: Floats, clusters: NDArray[np.int64], seed: int
) -> dict[str, Measured]:
    """Each measure of the task with its interval; `clusters` (R,) has the cluster of each row's protein."""
    _, rows = np.unique(clusters, return_inverse=True)
    count = int(rows.max()) + 1
    # sorted sums over very many rows take long, and their intervals need no more samples
    samples = SAMPLES if len(truth) <= 100_000 else SAMPLES // 5
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), samples).astype(np.float64)
    results = {}
    for name, measure in measures(targets, truth, outputs, predicted).items():
        value = measure(np.ones(len(truth)))
        low = high = None
        if count > 1:
            values = np.array([measure(weights[rows]) for weights in drawn])
            known = values[~np.isnan(values)]
            if len(known):
                low, high = (float(bound) for bound in np.percentile(known, [2.5, 97.5]))
        results[name] = Measured(value, low, high)
    return results
