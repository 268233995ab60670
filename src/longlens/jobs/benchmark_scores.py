"""How well scores of variants agree with measurements, and the mean over assays as ProteinGym computes it.

per assay   Spearman's rank correlation, with its sign; area under the ROC curve where there are classes
mean        over the assays of a protein (UniProt_ID) in a selection type, then over its proteins, then over types
of a taxon  over the assays of a protein, then over the proteins of the taxon, whatever their selection types
error       standard deviation of that mean when the proteins of each selection type (or taxon) are drawn with
            replacement; none where one of them has a single protein, which tells nothing of others

The means are those of performance_DMS_benchmarks.py of ProteinGym's repository, which rounds each assay's number to
three decimals first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longlens.finetuning.metrics import spearman
from longlens.io.proteingym import Assay

DRAWS = 10_000

Floats = NDArray[np.float64]


def ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values have the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def rank_agreement(scores: Floats, truth: Floats) -> float:
    """Spearman's rank correlation of the variants that have both numbers; NaN where either side is constant."""
    both = np.isfinite(scores) & np.isfinite(truth)
    return spearman(truth[both], scores[both])(np.ones(both.sum())) if both.any() else float("nan")


def area_under_curve(scores: Floats, classes: Floats) -> float:
    """Area under the ROC curve of the variants of class 1 against those of class 0; NaN without either."""
    both = np.isfinite(scores) & np.isfinite(classes)
    rank, fit = ranks(scores[both]), classes[both] > 0.5
    ones, zeros = int(fit.sum()), int((~fit).sum())
    if not ones or not zeros:
        return float("nan")
    return float((rank[fit].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def mean_and_error(values: Floats, assays: Sequence[Assay], *, by_selection: bool = True) -> tuple[float, float]:
    """The mean of one number for each assay, and its bootstrap error; NaN where there is none. Assays with NaN are left
    out. `by_selection`: over the selection types; otherwise over all proteins."""
    groups: dict[str, dict[str, list[float]]] = {}
    for value, assay in zip(values, assays, strict=True):
        if np.isfinite(value):
            group = groups.setdefault(assay.selection if by_selection else "", {})
            group.setdefault(assay.uniprot, []).append(float(value))
    if not groups:
        return float("nan"), float("nan")
    proteins = [np.array([np.mean(several) for several in groups[name].values()]) for name in sorted(groups)]
    mean = float(np.mean([part.mean() for part in proteins]))
    if min(map(len, proteins)) == 1:
        return mean, float("nan")
    draw = np.random.default_rng(0)
    drawn = np.mean([part[draw.integers(len(part), size=(DRAWS, len(part)))].mean(1) for part in proteins], 0)
    return mean, float(drawn.std(ddof=1))


def summary_rows(values: Floats, assays: Sequence[Assay]) -> list[tuple[str, str, float, float, int]]:
    """(kind of group, group, mean, error, assays) of all assays, of each selection type and of each taxon."""
    rows = []
    kinds = [("all", ["" for _ in assays]), ("selection", [assay.selection for assay in assays]),
             ("taxon", [assay.taxon for assay in assays])]  # fmt: skip
    for kind, names in kinds:
        for name in sorted(set(names)):
            if kind != "all" and not name:
                continue
            chosen = [place for place, other in enumerate(names) if other == name]
            part = values[chosen]
            mean, error = mean_and_error(part, [assays[place] for place in chosen], by_selection=kind != "taxon")
            rows.append((kind, name, mean, error, int(np.isfinite(part).sum())))
    return rows
