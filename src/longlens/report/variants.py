"""The effects of all single substitutions in a protein, as heat maps.

Rows are the 20 residues, grouped by their chemistry; columns are positions. Blue is worse than the wild type, red
better; the wild type of each position is marked by a dot. A protein longer than `WRAPPED` residues is shown in cells of
several positions, each the mean over these, above a track of the mean of each position's 19 substitutions.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.report import figures

if TYPE_CHECKING:
    from longlens.report.figures import Axes, Figure

# the columns of scores, in the order in which `longlens.io.alphabet.STANDARD` names residues
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
# rows from top to bottom: aromatic, aliphatic, small, proline and glycine, polar, basic, acidic
ROWS = "WYFMLIVACGPTSNQHKRED"
# positions in a line of the figure; longer proteins than `WRAPPED` are shown in cells of several positions
LINE = 100
WRAPPED = 600
# cells in the only line of a long protein
CELLS = 250
# effects beyond this quantile share the darkest colour
SHARE = 0.99


def draw_substitutions(scores: NDArray[Any], sequence: str, *, title: str, first: int = 1) -> Figure:
    """The matrix of variant effects of a protein.

    Args:
        scores: (L, 20), columns as `RESIDUES`: the score of each position becoming each residue, higher is better
            tolerated; 0 where it stays, NaN where there is no score.
        sequence: L residues.
        title: the protein, the model and the strategy.
        first: number of the first residue.

    Raises:
        InputError: shapes that do not fit, no residues, no matplotlib.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(sequence), len(RESIDUES)) or not sequence:
        raise InputError(
            f"expected scores (L, {len(RESIDUES)}) of at least one residue, got {scores.shape} for a sequence of "
            f"{len(sequence)}"
        )
    rows = scores[:, [RESIDUES.index(residue) for residue in ROWS]].T
    wild = np.array([[residue == row for residue in sequence] for row in ROWS])
    if len(sequence) <= WRAPPED:
        return _wrapped(rows, wild, sequence, title, first)
    return _binned(rows, wild, title, first)


def save_substitutions(scores: NDArray[Any], sequence: str, path: Path, *, title: str, first: int = 1) -> Path:
    """Draw (`draw_substitutions`) and write `path`, which ends in .png or .svg."""
    if path.suffix.removeprefix(".") not in figures.FORMATS:
        raise InputError(f"expected a path that ends in .png or .svg, got {path}")
    figure = draw_substitutions(scores, sequence, title=title, first=first)
    return figures.save(figure, path.parent, path.stem, [path.suffix.removeprefix(".")])[0]


def _limit(effects: NDArray[Any]) -> float:
    """The end of the colour scale, on both sides of 0, such that a few extreme effects do not make the others pale."""
    sizes = np.abs(effects[np.isfinite(effects)])
    return max(float(np.quantile(sizes, SHARE)), 1e-9) if sizes.size else 1.0


def _wrapped(rows: NDArray[Any], wild: NDArray[np.bool_], sequence: str, title: str, first: int) -> Figure:
    """A line of the figure for each `LINE` positions, with every residue named."""
    count, top = len(sequence), _limit(rows[~wild])
    lines = -(-count // LINE)
    width = min(count, LINE)
    figure = figures.new_figure((max(4.0, 1.6 + 0.098 * width), 0.9 + 2.35 * lines))
    axes = figure.subplots(lines, 1, squeeze=False)[:, 0]
    mesh: Any = None
    for line, ax in enumerate(axes):
        start = line * LINE
        stop = min(start + LINE, count)
        mesh = _heat(ax, rows[:, start:stop], (first + start - 0.5, first + stop - 0.5), top)
        places = np.argwhere(wild[:, start:stop])
        ax.plot(places[:, 1] + first + start, places[:, 0], ".", color="black", ms=2.5, mew=0)
        # all lines have the same scale, so the last one may be shorter
        ax.set_xlim(first + start - 0.5, first + start + width - 0.5)
        ax.spines["bottom"].set_bounds(first + start - 0.5, first + stop - 0.5)
        for spine in ("top", "right"):
            ax.spines[spine].set_visible(stop - start == width)
        ax.set_xticks([number for number in range(first + start, first + stop) if number % 10 == 0 or count <= 10])
        letters = ax.secondary_xaxis("top")
        letters.set_xticks(range(first + start, first + stop), list(sequence[start:stop]))
        letters.tick_params(labelsize=5, length=0, pad=1)
        letters.spines["top"].set_visible(False)
    axes[-1].set_xlabel("position (letters: wild type, also the dots)", fontsize=8)
    _finish(figure, list(axes), mesh, title)
    return figure


def _binned(rows: NDArray[Any], wild: NDArray[np.bool_], title: str, first: int) -> Figure:
    """One line of cells of several positions, and below it what each position tolerates."""
    count = rows.shape[1]
    width = -(-count // CELLS)
    effects = np.where(wild, np.nan, rows)
    cells = np.stack([_mean(effects[:, start : start + width], 1) for start in range(0, count, width)], 1)
    figure = figures.new_figure((11.0, 5.6))
    upper, lower = figure.subplots(2, 1, height_ratios=[2.2, 1], sharex=True)
    mesh = _heat(upper, cells, (first - 0.5, first - 0.5 + width * cells.shape[1]), _limit(cells))
    upper.tick_params(labelbottom=False)
    _track(lower, _mean(effects, 0), width, first)
    _finish(figure, [upper], mesh, title)
    return figure


def _track(ax: Axes, mean: NDArray[Any], width: int, first: int) -> None:
    """The mean effect at each position, and the means of `width` positions."""
    count = len(mean)
    ax.axhline(0, color="0.6", lw=0.6)
    ax.plot(np.arange(first, first + count), mean, color="0.6", lw=0.3, rasterized=True,
            label="each position, mean of its 19")  # fmt: skip
    starts = range(0, count // width * width, width)
    smooth = [_mean(mean[start : start + width], 0) for start in starts]
    middles = [first + start + (width - 1) / 2 for start in starts]
    ax.plot(middles, smooth, color="tab:blue", lw=1, label=f"mean of {width} positions")
    ax.set_xlim(first - 0.5, first + count - 0.5)
    ax.set_ylabel("score", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)
    ax.set_xlabel(f"position (each cell above: the mean of {width} positions)", fontsize=8)


def _mean(values: NDArray[Any], axis: int) -> Any:
    """The mean of the values that are not NaN; NaN if there are none, without a warning."""
    finite = np.isfinite(values)
    total = np.where(finite, values, 0.0).sum(axis)
    return np.divide(total, finite.sum(axis), out=np.full_like(total, np.nan), where=finite.any(axis))


def _heat(ax: Axes, rows: NDArray[Any], span: tuple[float, float], top: float) -> Any:
    extent = (*span, len(ROWS) - 0.5, -0.5)
    mesh = ax.imshow(
        np.ma.masked_invalid(rows), aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top, extent=extent,
        interpolation="nearest",
    )  # fmt: skip
    # a missing score is neither good nor bad
    mesh.set_cmap(mesh.get_cmap().with_extremes(bad="0.8"))
    ax.set_yticks(range(len(ROWS)), list(ROWS))
    ax.tick_params(axis="y", labelsize=5.5, length=0, pad=2)
    ax.tick_params(axis="x", labelsize=7)
    ax.set_ylabel("becomes", fontsize=8)
    return mesh


def _finish(figure: Figure, axes: list[Axes], mesh: Any, title: str) -> None:
    bar = figure.colorbar(mesh, ax=axes, extend="both", shrink=min(1.0, 3.0 / figure.get_figheight()), pad=0.01)
    bar.set_label("score (below 0: worse than the wild type)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    title = textwrap.shorten(title, int(figure.get_figwidth() * 13), placeholder="...")
    figure.suptitle(f"Effects of all substitutions\n{figures.plain(title)}", fontsize=10)
