"""One statistic of one layer, drawn on given axes from arrays.

Values along the tokens are lines, one for each head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from longlens.report.figures import Axes

# heads whose names fit into a legend
NAMED = 12


def draw_lines(ax: Axes, values: NDArray[Any], axis: str, name: str) -> None:
    """`values` (H, N) along the tokens: a line for each head. `axis` names the tokens: "query" or "key"."""
    for head, line in enumerate(values):
        ax.plot(line, lw=0.8, label=f"head {head}")
    ax.set(xlabel=axis, ylabel=name.replace("_", " "))
    if len(values) <= NAMED:
        ax.legend(fontsize=7)


def draw_links(ax: Axes, query: NDArray[Any], key: NDArray[Any], weight: NDArray[Any], name: str) -> None:
    """Pairs of tokens as points, the heavier over the lighter."""
    order = np.argsort(weight)
    ax.scatter(key[order], query[order], c=weight[order], s=2, cmap="viridis", vmin=0)
    ax.invert_yaxis()
    ax.set(xlabel="key", ylabel="query", title=name)


def draw_map(ax: Axes, values: NDArray[Any], queries: NDArray[Any], keys: NDArray[Any], kind: str, name: str) -> None:
    """A pooled map (R, C) on a logarithmic scale; 0 and NaN are grey. `queries` (R + 1,) and `keys` (C + 1,) are the
    edges of its cells, `kind` the reduction of the weights in a cell ("mean")."""
    from matplotlib.colors import LogNorm

    shown = np.ma.masked_invalid(np.where(values > 0, values, np.nan))
    low = float(shown.min()) if shown.count() else 1e-6
    high = float(shown.max()) if shown.count() else 1.0
    norm = LogNorm(max(low, high * 1e-6), high)
    ax.set_facecolor("0.85")
    mesh = ax.pcolormesh(keys, queries, shown, norm=norm, cmap="magma_r", rasterized=True)
    ax.invert_yaxis()
    ax.set(xlabel="key", ylabel="query", title=f"{name} ({kind})", aspect="equal")
    ax.figure.colorbar(mesh, ax=ax, label=f"{kind} of weights")


def draw_histogram(ax: Axes, edges: NDArray[Any], mass: NDArray[Any], name: str) -> None:
    """`mass` (H, bins) between `edges` (bins + 1,): a line for each head."""
    for head, line in enumerate(mass):
        ax.stairs(line, edges, label=f"head {head}")
    ax.set(xlabel=name, ylabel="mass")


def draw_weights(ax: Axes, weights: NDArray[Any], name: str) -> None:
    """Weights (R, C) of some queries on some keys."""
    mesh = ax.imshow(weights, aspect="auto", cmap="magma_r")
    ax.set(xlabel="key", ylabel="query", title=name)
    ax.figure.colorbar(mesh, ax=ax, label="weight")


def draw_predictions(ax: Axes, token: NDArray[Any], lines: Mapping[str, NDArray[Any]], name: str) -> None:
    """Numbers in nats along the tokens, a named line for each."""
    for label, values in lines.items():
        ax.plot(token, values, lw=0.8, label=label)
    ax.set(xlabel="token", ylabel="nats", title=name)
    ax.legend(fontsize=7)


def draw_layers(ax: Axes, values: NDArray[Any], layers: Sequence[int], what: str) -> None:
    """`values` (layers, tokens) in nats: layers upwards, tokens to the right."""
    mesh = ax.imshow(values, aspect="auto", origin="lower", cmap="magma_r", vmin=0, interpolation="nearest")
    ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    ax.set(xlabel="token", ylabel="layer", title=f"{what} by layer")
    ax.figure.colorbar(mesh, ax=ax, label=f"{what}, nats")


def draw_heads(ax: Axes, values: NDArray[Any], layers: Sequence[int], name: str) -> None:
    """`values` (layers, heads): the mean over tokens of a statistic, layers downwards."""
    mesh = ax.imshow(values, aspect="auto", cmap="magma_r", interpolation="nearest")
    for axis, numbers in ((ax.yaxis, layers), (ax.xaxis, range(values.shape[1]))):
        step = -(-len(numbers) // 16)
        axis.set_ticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
    ax.set(xlabel="head", ylabel="layer", title=f"{name.replace('_', ' ')}, mean over tokens")
    ax.figure.colorbar(mesh, ax=ax)
