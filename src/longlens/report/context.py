"""What carried a prediction: the effect of each token along the sequence, the exact effect of stretches, and the curve
of surprise against context."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longlens.report import figures

if TYPE_CHECKING:
    from longlens.report.figures import Axes, Figure

# tokens whose letters are written below the track, and bars that are named
LETTERS, NAMED = 150, 12
CARRIED, MISLED = "tab:red", "tab:blue"
TRACK = "each token, to first order (ground: stretches, exact)"
# below the title, since bars and ground have both colours
MEANING = "red: carried the prediction; blue: misled it"


def draw_context(
    keys: NDArray[Any],
    labels: Sequence[str],
    target: int,
    spans: Sequence[tuple[int, int]],
    exact: Sequence[float],
    estimate: Sequence[float],
    *,
    title: str,
    surprise: float,
) -> Figure:
    """Above, the first-order effect of hiding each token (N,), on a ground of the stretches whose exact effect is
    known, the darker the stronger; below, the exact effects beside their estimates.

    `spans` (K, 2), `exact` and `estimate` (K,), in nats; above 0: without the stretch the target is more surprising.
    """
    order = [place for place in np.argsort(-np.abs(np.asarray(exact))) if np.isfinite(exact[place])]
    shown = order[:NAMED]
    figure = figures.new_figure((9.0, 3.4 + 0.22 * max(1, len(shown))))
    track, bars = figure.subplots(2, 1, height_ratios=[2.4, 0.4 + 0.22 * max(1, len(shown))])
    _track(track, keys, labels, target, [(spans[place], exact[place]) for place in order])
    _bars(bars, shown, [_named(spans[place], labels) for place in shown], exact, estimate)
    title = textwrap.shorten(title, 100, placeholder="...")
    figure.suptitle(f"What carried {figures.plain(title)}, surprise {surprise:.2f} nats", fontsize=10)
    return figure


def _track(
    ax: Axes, keys: NDArray[Any], labels: Sequence[str], target: int, known: Sequence[tuple[tuple[int, int], float]]
) -> None:
    places = np.arange(len(keys))
    ax.bar(places, keys, width=1.0, color=np.where(keys > 0, CARRIED, MISLED))
    ax.set_title(f"{TRACK}; {MEANING}", fontsize=7, loc="left")
    most = max((abs(effect) for _, effect in known), default=1.0) or 1.0
    for (start, stop), effect in known:
        colour = CARRIED if effect > 0 else MISLED
        ax.axvspan(start - 0.5, stop - 0.5, color=colour, alpha=0.05 + 0.3 * abs(effect) / most, lw=0, zorder=0)
    ax.axvline(target, color="0.4", lw=0.8, ls=":", label="target")
    ax.axhline(0, color="0.6", lw=0.6)
    # nothing behind the target of a causal model has an effect
    behind = bool(np.any(keys[target + 1 :])) or any(span[1] > target + 1 for span, _ in known)
    ax.set_xlim(-0.5, (len(keys) if behind else target + 1) - 0.5)
    ax.set_ylabel("change of surprise\nwhen hidden (nats)", fontsize=8)
    ax.set_xlabel("token", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)
    if len(labels) <= LETTERS and max(map(len, labels[1:-1]), default=1) == 1:
        letters = ax.secondary_xaxis(-0.13)
        letters.set_xticks(places, ["" if len(label) > 1 else figures.plain(label) for label in labels])
        letters.tick_params(labelsize=5, length=0, pad=1)
        letters.spines["bottom"].set_visible(False)
        ax.set_xlabel("")


def _named(span: tuple[int, int], labels: Sequence[str]) -> str:
    """The numbers of a stretch; a single token has its text too."""
    start, last = span[0], span[1] - 1
    if start < last:
        return f"{start}-{last}"
    return figures.plain(f"{textwrap.shorten(labels[start], 12, placeholder='...')} {start}".strip())


def _bars(
    ax: Axes, shown: Sequence[int], names: Sequence[str], exact: Sequence[float], estimate: Sequence[float]
) -> None:
    places = np.arange(len(shown))
    values = np.array([exact[place] for place in shown])
    ax.barh(places, values, height=0.7, color=np.where(values > 0, CARRIED, MISLED))
    ax.plot([estimate[place] for place in shown], places, "k|", ms=7, mew=1.2, label="estimate (bars: exact)")
    ax.axvline(0, color="0.6", lw=0.6)
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xlabel(
        "change of surprise when a stretch is hidden (nats); right of 0: it carried the prediction", fontsize=8
    )
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)


def draw_curve(lengths: Sequence[int], surprise: NDArray[Any], *, title: str) -> Figure:
    """Mean surprise of tokens, (lengths, T), where the model is given so many tokens, with its standard error; and the
    mean gain from each step to the next."""
    figure = figures.new_figure((8.0, 3.2))
    left, right = figure.subplots(1, 2)
    gains = surprise[:-1] - surprise[1:]
    for ax, rows, along, name in (
        (left, surprise, lengths, "mean surprise (nats)"),
        (right, gains, lengths[1:], "mean gain from the length before (nats)"),
    ):
        mean = rows.mean(1)
        error = rows.std(1, ddof=1) / np.sqrt(rows.shape[1]) if rows.shape[1] > 1 else np.zeros(len(rows))
        ax.errorbar(along, mean, yerr=error, fmt="o-", ms=3, lw=1, capsize=2, color="tab:blue")
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(along), list(map(str, along)))
        ax.minorticks_off()
        ax.set_xlabel("tokens of context", fontsize=8)
        ax.set_ylabel(name, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    right.axhline(0, color="0.6", lw=0.6)
    title = textwrap.shorten(title, 100, placeholder="...")
    figure.suptitle(f"Surprise against context, {figures.plain(title)}, {surprise.shape[1]} tokens", fontsize=10)
    return figure
