"""Surprise along a text, drawn from arrays: the values, and their mean over a stretch of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from longlens.report.figures import WIDTH, new_figure, plain

if TYPE_CHECKING:
    from longlens.report.figures import Figure

# the most texts that fit under the axis
NAMED = 60
# letters of one of them
LETTERS = 16
# points of a line; of a longer text stretches are drawn by their mean, lowest and highest value
POINTS = 2000


def draw_surprise(
    surprise: NDArray[np.float64],
    entropy: NDArray[np.float64] | None,
    texts: Sequence[str] | None,
    *,
    unit: str,
    each: str,
    title: str,
    first: int = 0,
) -> Figure:
    """`surprise` (n,) of each token, word or line (`each`) as a line, with `entropy` (n,), which is what the model
    expected, where there is one. Up to 60 `texts` are written below the axis, otherwise numbers from `first`."""
    count = len(surprise)
    named = texts is not None and count <= NAMED
    figure = new_figure((WIDTH, 3.2 if named else 2.6))
    ax = figure.add_subplot()
    if count <= POINTS:
        place = first + np.arange(count)
        if named:
            ax.bar(place, np.nan_to_num(surprise), color="tab:blue", label="surprise")
        else:
            ax.plot(place, surprise, lw=0.7, color="tab:blue", label="surprise")
        if entropy is not None:
            ax.plot(place, entropy, color="tab:orange", lw=1.0, label="entropy (expected)", drawstyle="steps-mid")
    else:
        edges = np.linspace(0, count, POINTS // 4 + 1).astype(int)
        place = first + (edges[:-1] + edges[1:]) / 2
        low, mean, high = _stretches(surprise, edges)
        ax.fill_between(place, low, high, color="tab:blue", alpha=0.25, lw=0, label="lowest to highest")
        ax.plot(place, mean, color="tab:blue", lw=0.9, label="surprise, mean")
        if entropy is not None:
            ax.plot(place, _stretches(entropy, edges)[1], color="tab:orange", lw=0.9, label="entropy (expected), mean")
    if named and texts is not None:
        ax.set_xticks(place, [_cut(plain(text)) for text in texts], rotation=90, fontsize=7)
    ax.margins(x=0.01)
    if named:
        # bars stand on 0; a line may vary little about a high value
        ax.set_ylim(bottom=0)
    ax.set(xlabel="" if named else each, ylabel=unit, title=plain(title))
    ax.legend(fontsize=7, ncols=3)
    return figure


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 3]}..."


def _stretches(values: NDArray[np.float64], edges: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Lowest, mean and highest value of each stretch, without missing ones."""
    parts = [values[a:b][~np.isnan(values[a:b])] for a, b in pairwise(edges)]
    return [
        np.array([float(take(part)) if len(part) else np.nan for part in parts]) for take in (np.min, np.mean, np.max)
    ]
