"""Figures of one sequence: overview of its heads, tracks along it, attention maps, strongest partners.

Each figure has a title, and in `about` the sequence, the model and N.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.report.figures import WIDTH, new_figure, plain
from longlens.report.labels import TokenLabels

if TYPE_CHECKING:
    from longlens.report.figures import Axes, Figure

# the most tokens whose labels fit under an axis
LABELLED = 48
# least height of a track's axes, in points
TRACK = 105
# longer sequences are drawn as running means, too
SMOOTHED = 1000
# the most heads whose values are written into the cells of the overview
WRITTEN = 150
# weights more than this many powers of ten below the largest have the lightest colour
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


class Partner(NamedTuple):
    """Another token, the weight between the two, and the head with that weight ("layer 3, head 2")."""

    token: int
    weight: float
    where: str


def draw_overview(
    table: Mapping[str, NDArray[Any]], layers: Sequence[int], heads: Sequence[int], *, about: str
) -> Figure:
    """Layer x head: each of `PANELS` that `table` has, (L, H) by name. Raises `InputError` if it has none."""
    panels = [(name, *words) for name, words in PANELS.items() if name in table]
    if not panels:
        raise InputError("expected entropy, distance, received or neighbours to be collected for an overview, got none")
    wide = min(2, len(panels))
    tall = -(-len(panels) // wide)
    # cells are about square unless there are very few or very many layers
    height = min(4.5, max(1.0, 2.8 * len(layers) / len(heads)), 0.32 * len(layers) + 0.6)
    figure = new_figure((WIDTH / 2 * wide, (0.75 + height) * tall + 0.5))
    axes = figure.subplots(tall, wide, squeeze=False)
    for ax, (name, title, label) in zip(axes.flat, panels, strict=False):
        image = _heat(ax, table[name], title, share=not name.startswith("mean"))
        for axis, numbers in ((ax.xaxis, heads), (ax.yaxis, layers)):
            step = -(-len(numbers) // 16)
            axis.set_ticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
        bar = figure.colorbar(image, ax=ax)
        bar.set_label(label, fontsize=7)
        bar.ax.tick_params(labelsize=7)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    _headline(figure, "What each head attends to", about)
    return figure


def _heat(ax: Axes, values: NDArray[Any], title: str, *, share: bool) -> Any:
    # the scale reaches at least a tenth, so that small weights do not look large if all heads have less
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
    ax.tick_params(labelsize=7)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("head", fontsize=8)
    ax.set_ylabel("layer", fontsize=8)
    return image


def draw_tracks(
    tokens: TokenLabels,
    *,
    received: NDArray[Any] | None,
    surprise: NDArray[Any] | None,
    expected: NDArray[Any] | None,
    named: Sequence[int] = (),
    subject: str,
    about: str,
) -> Figure:
    """Along the sequence, each (N,): attention `received`, and `surprise` beside what was `expected` of it; the tokens
    `named` are named beside the highest ones. Raises `InputError` if there is neither."""
    parts = [part for part in (received, surprise) if part is not None]
    if not parts:
        raise InputError("expected received or surprise to be collected for tracks, got neither")
    figure = new_figure((WIDTH, 0.9 + 2.1 * len(parts)))
    axes = list(figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0])
    if received is not None:
        _received_track(axes[0], tokens, received, named)
    if surprise is not None:
        ax = axes[-1]
        _line(ax, surprise, "tab:red", "surprise")
        if expected is not None:
            _line(ax, expected, "0.35", "expected (entropy)", thin=True)
        ax.set_ylim(0, None)
        ax.set_ylabel("nats", fontsize=8)
        if received is None:
            _name_peaks(ax, tokens, np.nan_to_num(surprise), named)
        _legend(ax)
    _token_axis(axes[-1], tokens)
    _headline(figure, f"Along the sequence: {subject}", about)
    return figure


def _received_track(ax: Axes, tokens: TokenLabels, received: NDArray[Any], named: Sequence[int]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    _line(ax, received, "tab:blue", "mean over heads")
    ax.axhline(1, color="0.5", lw=0.8, ls="--", label="each, if attention were even")
    ax.set_yscale("log")
    ax.set_ylim(float(received[received > 0].min(initial=1.0)) / 1.3, None)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("attention received\n(sum of weights)", fontsize=8)
    _name_peaks(ax, tokens, received, named)
    _legend(ax)


def draw_maps(
    maps: Sequence[tuple[NDArray[Any], str]], queries: NDArray[Any], keys: NDArray[Any], *, about: str
) -> Figure:
    """Pooled maps (R, C), each with its title, on one logarithmic scale; NaN (masked pairs) has a separate
    colour. Row cell r holds queries `queries`[r] to `queries`[r + 1], and columns likewise."""
    if not maps:
        raise InputError("expected pooled to be collected and heads to be chosen for maps")
    from matplotlib.colors import LogNorm

    shown = [values for values, _ in maps]
    high = max((float(np.nanmax(values)) for values in shown if np.isfinite(values).any()), default=1.0) or 1.0
    smallest = min((float(values[values > 0].min()) for values in shown if (values > 0).any()), default=high)
    low = min(max(smallest, high * 10**-DECADES), high / 10)
    norm = LogNorm(low, high)
    wide = min(3, len(maps))
    tall = -(-len(maps) // wide)
    figure = new_figure((1.0 + (WIDTH - 1.0) / 3 * wide, 2.75 * tall + 0.5))
    axes = figure.subplots(tall, wide, squeeze=False)
    mesh: Any = None
    for ax, (values, title) in zip(axes.flat, maps, strict=False):
        ax.set_facecolor(MASKED)
        clipped = np.ma.masked_invalid(np.maximum(values, low))
        mesh = ax.pcolormesh(keys, queries, clipped, norm=norm, cmap="magma_r", rasterized=True)
        ax.set(aspect="equal")
        ax.invert_yaxis()
        ax.tick_params(labelsize=7)
        ax.set_title(title.rstrip(), fontsize=8)
        ax.set_xlabel("key (token)", fontsize=8)
        ax.set_ylabel("query (token)", fontsize=8)
    for ax in axes.flat[len(maps) :]:
        ax.set_axis_off()
    cell = int(keys[1] - keys[0])
    label = "weight" if cell == 1 else f"mean weight of {cell} x {cell} tokens"
    bar = figure.colorbar(mesh, ax=axes, shrink=0.8, extend="min" if smallest < low else "neither")
    bar.set_label(f"{label} (log scale)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    masked = any(np.isnan(values).any() for values in shown)
    _headline(figure, "Attention maps" + (" (blue: may not attend)" if masked else ""), about)
    return figure


def draw_partners(
    tokens: TokenLabels,
    chosen: Sequence[int],
    sides: Sequence[tuple[str, Sequence[Sequence[Partner]]]],
    *,
    count: int,
    about: str,
) -> Figure:
    """For each of the tokens `chosen` its strongest partners, at most `count`, the strongest first. `sides` holds a
    verb ("looks at") and the partners of each chosen token. Raises `InputError` if there is nothing to draw."""
    if not sides or not chosen:
        raise InputError("expected top_keys or top_queries to be collected and tokens to be chosen for partners")
    figure = new_figure((WIDTH / 2 * len(sides), 0.8 + (0.5 + 0.17 * count) * len(chosen)))
    axes = figure.subplots(len(chosen), len(sides), squeeze=False, sharex=True)
    for column, (verb, lists) in enumerate(sides):
        for row, (token, partners) in enumerate(zip(chosen, lists, strict=True)):
            ax = axes[row, column]
            colors = ["0.6" if tokens.special[partner.token] else "tab:blue" for partner in partners]
            ax.barh(range(len(partners)), [partner.weight for partner in partners], color=colors, height=0.7)
            names = [plain(tokens.caption(partner.token)) for partner in partners]
            ax.set_yticks(range(len(partners)), names, fontsize=7)
            for place, partner in enumerate(partners):
                text = f"{partner.weight:.2f}  {partner.where}"
                ax.text(partner.weight + 0.015, place, text, va="center", fontsize=7, color="0.3")
            ax.set_ylim(count - 0.4, -0.6)
            ax.set_xlim(0, 1.65)
            ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
            ax.tick_params(axis="x", labelsize=7)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_title(f"{plain(tokens.caption(token))} {verb}", fontsize=9, loc="left")
    for ax in axes[-1]:
        ax.set_xlabel("largest weight in any head (grey: special tokens)", fontsize=8)
    _headline(figure, "Strongest partners", about)
    return figure


def _headline(figure: Figure, subject: str, about: str) -> None:
    width = int(figure.get_figwidth() * 12)
    figure.suptitle(f"{subject}\n{plain(textwrap.shorten(about, width, placeholder='...'))}", fontsize=10)


def _line(ax: Axes, values: NDArray[Any], color: str, label: str, *, thin: bool = False) -> None:
    tokens = np.arange(len(values))
    if len(values) > SMOOTHED:
        window = len(values) // 200
        # single values, faint, under their running mean; rasterised, since many vector lines display slowly
        ax.plot(tokens, values, color=color, lw=0.3, alpha=0.25, rasterized=True)
        kernel, finite = np.ones(window), np.isfinite(values)
        values = np.convolve(np.where(finite, values, 0), kernel, "same") / np.convolve(finite, kernel, "same")
        label = f"{label}, mean of {window} tokens"
    marker = "." if len(values) <= LABELLED else None
    ax.plot(tokens, values, color=color, lw=0.7 if thin else 1, label=label, marker=marker, ms=4)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: Axes) -> None:
    ax.legend(fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)


def _name_peaks(ax: Axes, tokens: TokenLabels, values: NDArray[Any], first: Sequence[int], most: int = 12) -> None:
    """Names above the highest tokens, those of `first` before others, each far enough from the others, and room for
    them."""
    apart = max(1.0, len(values) / 40)
    ranked = [*first, *(int(place) for place in np.argsort(-values, kind="stable"))]
    named: dict[int, str] = {}
    for token in ranked[: max(most, len(first)) * 4]:
        if len(named) < most and all(abs(token - other) >= apart for other in named):
            named[token] = textwrap.shorten(plain(tokens.caption(token)), 24, placeholder="...")
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


def _token_axis(ax: Axes, tokens: TokenLabels) -> None:
    count = len(tokens)
    ax.set_xlim(-0.5 - count * 0.015, count - 0.5 + count * 0.015)
    if count <= LABELLED:
        labels = [plain(label) for label in tokens.labels]
        ax.set_xticks(range(count), labels, fontsize=7, rotation=0 if tokens.residues else 90)
    ax.set_xlabel("residue" if tokens.residues else "token", fontsize=8)
