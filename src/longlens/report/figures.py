"""Figures of what was seen of one sequence (`longlens.report.profile.Sight`): overview, tracks, maps, partners.

Each says what it shows, the model and N. Needs matplotlib (extra `plot`); no global state of it is touched.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.report.profile import Sight

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

FORMATS = ("png", "svg")
DOTS = 150
# inches; small type can be read when the figure is shown 800 points wide
WIDTH = 8.0
# tokens whose labels still fit under an axis
LABELLED = 48
# height of a track's axes in points, at least
TRACK = 105
# tokens above which lines are drawn as running means, too
SMOOTHED = 1000
# heads, and numbers written into their cells, that can still be read
WRITTEN = 150
# weights below the largest by this much share the lightest colour
DECADES = 5.0
MASKED = "#bcd3e6"
PANELS = {
    "mean_entropy": ("entropy", "nats, mean over queries"),
    "mean_distance": ("distance", "tokens, mean over queries"),
    "first": ("on the first token", "mean weight"),
    "separators": ("on separators and end", "mean weight"),
    "previous": ("on the previous token", "mean weight"),
    "next": ("on the next token", "mean weight"),
}


def require_matplotlib() -> None:
    """Raise `InputError` where matplotlib is missing."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise InputError("expected matplotlib for figures, found none; pip install 'longlens[plot]', or --no-figures")


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write `name`.png and `name`.svg; the same figure gives the same bytes.

    Signs that no font has are boxes in the PNG; one warning names them all.
    """
    import matplotlib as mpl

    paths = [folder / f"{name}.{kind}" for kind in formats]
    # text stays text, so that it can be edited and searched
    with (
        mpl.rc_context({"svg.hashsalt": "longlens", "svg.fonttype": "none"}),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        for path in paths:
            figure.savefig(path, dpi=DOTS, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    missing = set()
    for warning in said:
        found = re.match(r"Glyph (\d+) .*missing", str(warning.message))
        if found:
            missing.add(int(found[1]))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if missing:
        signs = " ".join(map(chr, sorted(missing)))
        warnings.warn(f"no font that matplotlib finds has {signs}: boxes in the PNG, text in the SVG", stacklevel=2)
    return paths


def overview(sight: Sight) -> Figure:
    """Layer x head: mean entropy, mean distance, and how much goes to the first token, separators and neighbours."""
    table = sight.overview()
    panels = [(name, *words) for name, words in PANELS.items() if name in table]
    if not panels:
        raise InputError("expected entropy, distance, received or neighbours to be collected for an overview, got none")
    wide = min(2, len(panels))
    tall = -(-len(panels) // wide)
    # cells are about square, where there are neither very few nor very many layers
    height = min(4.5, max(1.0, 2.8 * len(sight.layers) / len(sight.heads)), 0.32 * len(sight.layers) + 0.6)
    figure = new_figure((WIDTH / 2 * wide, (0.75 + height) * tall + 0.5))
    axes = figure.subplots(tall, wide, squeeze=False)
    for ax, (name, title, label) in zip(axes.flat, panels, strict=False):
        _heat(ax, sight, table[name], title, label, share=not name.startswith("mean"))
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    _headline(figure, "What each head attends to", sight)
    return figure


def _heat(ax: Axes, sight: Sight, values: NDArray[Any], title: str, label: str, *, share: bool) -> None:
    # a tenth of the weight is little: it must not look like much because all heads have less
    top = max(float(np.nanmax(values)), 0.1 if share else 1e-9)
    image = ax.imshow(values, aspect="auto", cmap="magma_r", vmin=0, vmax=top, interpolation="nearest")
    if values.size <= WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            # without the zero, two digits fit into a cell
            text = f"{value:.2f}".removeprefix("0") if share else f"{value:.0f}" if top >= 10 else f"{value:.1f}"
            red, green, blue, _ = image.cmap(image.norm(value))
            color = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.55 else "white"
            size = 7 if values.shape[1] <= 12 else 5
            ax.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
    for axis, numbers in ((ax.xaxis, sight.heads), (ax.yaxis, sight.layers)):
        step = -(-len(numbers) // 16)
        axis.set_ticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
    ax.tick_params(labelsize=7)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("head", fontsize=8)
    ax.set_ylabel("layer", fontsize=8)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=7)


def tracks(sight: Sight, tokens: Sequence[int] = ()) -> Figure:
    """Along the sequence: attention received, averaged over the layers and heads seen, and surprise; `tokens` are named
    beside those that stand out."""
    received, surprise = sight.by_token.get("received"), sight.predicted.get("surprise")
    if received is None and surprise is None:
        raise InputError("expected received or surprise to be collected for tracks, got neither")
    from matplotlib.ticker import LogLocator, NullFormatter

    parts = [part for part in (received, surprise) if part is not None]
    figure = new_figure((WIDTH, 0.9 + 2.1 * len(parts)))
    axes = list(figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0])
    if received is not None:
        ax = axes[0]
        mean = received.mean((0, 1), dtype=np.float64)
        _line(ax, mean, "tab:blue", "mean over heads")
        ax.axhline(1, color="0.5", lw=0.8, ls="--", label="each, if attention were even")
        ax.set_yscale("log")
        ax.set_ylim(float(mean[mean > 0].min(initial=1.0)) / 1.3, None)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_ylabel("attention received\n(sum of weights)", fontsize=8)
        _name_peaks(ax, sight, mean, tokens)
        _legend(ax)
    if surprise is not None:
        ax = axes[-1]
        _line(ax, surprise, "tab:red", "surprise")
        _line(ax, sight.predicted["expected"], "0.35", "expected (entropy)", thin=True)
        ax.set_ylim(0, None)
        ax.set_ylabel("nats", fontsize=8)
        if received is None:
            _name_peaks(ax, sight, np.nan_to_num(surprise), tokens)
        _legend(ax)
    _token_axis(axes[-1], sight)
    layers, heads = (_span(numbers) for numbers in (sight.layers, sight.heads))
    _headline(figure, f"Along the sequence: layers {layers}, heads {heads}", sight)
    return figure


def maps(sight: Sight, heads: Sequence[tuple[int, int, str]]) -> Figure:
    """Pooled maps of heads, given as (layer's place, head's place, why it is shown), on one logarithmic scale; what may
    not attend has a colour of its own."""
    found = sight.maps
    if found is None or not heads:
        raise InputError("expected pooled to be collected and heads to be chosen for maps")
    from matplotlib.colors import LogNorm

    shown = [found.values[layer, head] for layer, head, _ in heads]
    high = max((float(np.nanmax(values)) for values in shown if np.isfinite(values).any()), default=1.0) or 1.0
    smallest = min((float(values[values > 0].min()) for values in shown if (values > 0).any()), default=high)
    low = min(max(smallest, high * 10**-DECADES), high / 10)
    norm = LogNorm(low, high)
    wide = min(3, len(heads))
    tall = -(-len(heads) // wide)
    figure = new_figure((1.0 + (WIDTH - 1.0) / 3 * wide, 2.75 * tall + 0.5))
    axes = figure.subplots(tall, wide, squeeze=False)
    mesh: Any = None
    for ax, values, (layer, head, why) in zip(axes.flat, shown, heads, strict=False):
        ax.set_facecolor(MASKED)
        clipped = np.ma.masked_invalid(np.maximum(values, low))
        mesh = ax.pcolormesh(found.keys, found.queries, clipped, norm=norm, cmap="magma_r", rasterized=True)
        ax.set(aspect="equal")
        ax.invert_yaxis()
        ax.tick_params(labelsize=7)
        ax.set_title(f"layer {sight.layers[layer]}, head {sight.heads[head]}\n{why}".rstrip(), fontsize=8)
        ax.set_xlabel("key (token)", fontsize=8)
        ax.set_ylabel("query (token)", fontsize=8)
    for ax in axes.flat[len(heads) :]:
        ax.set_axis_off()
    cell = int(found.keys[1] - found.keys[0])
    label = "weight" if cell == 1 else f"mean weight of {cell} x {cell} tokens"
    bar = figure.colorbar(mesh, ax=axes, shrink=0.8, extend="min" if smallest < low else "neither")
    bar.set_label(f"{label} (log scale)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    masked = any(np.isnan(values).any() for values in shown)
    _headline(figure, "Attention maps" + (" (blue: may not attend)" if masked else ""), sight)
    return figure


def partners(sight: Sight, tokens: Sequence[int], count: int = 6) -> Figure:
    """The strongest links of each of `tokens` in any layer and head seen: what it looks at, and what looks at it."""
    sides = [(links, title) for links, title in ((sight.keys, "looks at"), (sight.queries, "is looked at by"))
             if links is not None]  # fmt: skip
    if not sides or not tokens:
        raise InputError("expected top_keys or top_queries to be collected and tokens to be chosen for partners")
    figure = new_figure((WIDTH / 2 * len(sides), 0.8 + (0.5 + 0.17 * count) * len(tokens)))
    axes = figure.subplots(len(tokens), len(sides), squeeze=False, sharex=True)
    for row, token in enumerate(tokens):
        for ax, (links, title) in zip(axes[row], sides, strict=True):
            found = links.strongest(token, count)
            weights = [weight for *_, weight in found]
            colors = ["0.6" if sight.sequence.special[other] else "tab:blue" for other, *_ in found]
            ax.barh(range(len(found)), weights, color=colors, height=0.7)
            names = [plain(sight.sequence.caption(other)) for other, *_ in found]
            ax.set_yticks(range(len(found)), names, fontsize=7)
            for place, (_, layer, head, weight) in enumerate(found):
                text = f"{weight:.2f}  layer {sight.layers[layer]}, head {sight.heads[head]}"
                ax.text(weight + 0.015, place, text, va="center", fontsize=7, color="0.3")
            ax.set_ylim(count - 0.4, -0.6)
            ax.set_xlim(0, 1.65)
            ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
            ax.tick_params(axis="x", labelsize=7)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_title(f"{plain(sight.sequence.caption(token))} {title}", fontsize=9, loc="left")
    for ax in axes[-1]:
        ax.set_xlabel("largest weight in any head (grey: special tokens)", fontsize=8)
    _headline(figure, "Strongest partners", sight)
    return figure


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure of so many inches that pyplot does not know."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _headline(figure: Figure, what: str, sight: Sight) -> None:
    width = int(figure.get_figwidth() * 12)
    figure.suptitle(f"{what}\n{plain(textwrap.shorten(sight.about, width, placeholder='...'))}", fontsize=10)


def plain(text: str) -> str:
    """Text that matplotlib takes as it is: "$" would begin a formula."""
    return text.replace("$", r"\$").replace("\n", "\\n").strip() or "(blank)"


def _line(ax: Axes, values: NDArray[Any], color: str, label: str, *, thin: bool = False) -> None:
    tokens = np.arange(len(values))
    if len(values) > SMOOTHED:
        window = len(values) // 200
        # single values, faint, under their running mean; as points of a picture, since as lines they open slowly
        ax.plot(tokens, values, color=color, lw=0.3, alpha=0.25, rasterized=True)
        kernel, there = np.ones(window), np.isfinite(values)
        values = np.convolve(np.where(there, values, 0), kernel, "same") / np.convolve(there, kernel, "same")
        label = f"{label}, mean of {window} tokens"
    marker = "." if len(values) <= LABELLED else None
    ax.plot(tokens, values, color=color, lw=0.7 if thin else 1, label=label, marker=marker, ms=4)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: Axes) -> None:
    ax.legend(fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)


def _name_peaks(ax: Axes, sight: Sight, values: NDArray[Any], tokens: Sequence[int], most: int = 12) -> None:
    """Names above the highest tokens, `tokens` first, each far enough from the others, and room for them."""
    apart = max(1.0, len(values) / 40)
    ranked = [*tokens, *(int(place) for place in np.argsort(-values, kind="stable"))]
    named: dict[int, str] = {}
    for token in ranked[: max(most, len(tokens)) * 4]:
        if len(named) < most and all(abs(token - other) >= apart for other in named):
            named[token] = textwrap.shorten(plain(sight.sequence.caption(token)), 24, placeholder="...")
    logarithmic = ax.get_yscale() == "log"
    low, top = (np.log(limit) if logarithmic else limit for limit in ax.get_ylim())
    for token, name in named.items():
        ax.annotate(name, (token, values[token]), (0, 5), textcoords="offset points",
                    rotation=90, ha="center", va="bottom", fontsize=7,
                    bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 0.6})  # fmt: skip
        # the part of the axes that a name takes: about 4.6 points a letter
        share = min(0.8, (4.6 * len(name) + 8) / TRACK)
        height = np.log(max(values[token], 1e-9)) if logarithmic else values[token]
        top = max(top, low + (height - low) / (1 - share))
    ax.set_ylim(None, np.exp(top) if logarithmic else top)


def _token_axis(ax: Axes, sight: Sight) -> None:
    count = len(sight.sequence)
    ax.set_xlim(-0.5 - count * 0.015, count - 0.5 + count * 0.015)
    if count <= LABELLED:
        labels = [plain(label) for label in sight.sequence.labels]
        ax.set_xticks(range(count), labels, fontsize=7, rotation=0 if sight.sequence.residues else 90)
    ax.set_xlabel("residue" if sight.sequence.residues else "token", fontsize=8)


def _span(numbers: Sequence[int]) -> str:
    """0-5, or 0, 3, 5."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))
