"""What collectors return: the kinds of statistics (`longlens.lens.statistic` says what all of them can do)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.lens.statistic import Statistic, Values
from longlens.report import statistics

if TYPE_CHECKING:
    from longlens.report.figures import Axes


@dataclass(frozen=True, repr=False)
class RowValues(Values):
    """One number for each query: `values` (B, H, Nq)."""

    def columns(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        """batch, head, query, and the statistic under its name."""
        return _long({"batch": 0, "head": 1, "query": 2}, {self.name: self.values}, rows)

    def draw(self, ax: Axes) -> None:
        """A line for each head."""
        statistics.draw_lines(ax, _np(self.values[0]), "query", self.name)


@dataclass(frozen=True, repr=False)
class ColumnValues(Values):
    """One number for each key: `values` (B, H, Nk)."""

    def columns(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        """batch, head, key, and the statistic under its name."""
        return _long({"batch": 0, "head": 1, "key": 2}, {self.name: self.values}, rows)

    def draw(self, ax: Axes) -> None:
        """A line for each head."""
        statistics.draw_lines(ax, _np(self.values[0]), "key", self.name)


@dataclass(frozen=True, repr=False)
class TopK(Statistic):
    """The largest weights of each query (`axis` "query") or key, largest first.

    `index` (B, H, N, k) int64: the key (or query), -1 where fewer than k exist; `weight` (B, H, N, k), 0 there.
    """

    index: Tensor
    weight: Tensor
    axis: str = "query"

    def columns(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        """batch, head, query (or key), place from 0, the other's index, weight; absent places are left out."""
        there = (self.index.reshape(-1) >= 0).nonzero().squeeze(1)[:rows]
        places = np.unravel_index(there.cpu().numpy(), tuple(self.index.shape))
        other = "key" if self.axis == "query" else "query"
        return dict(zip(("batch", "head", self.axis, "place"), places, strict=True)) | {
            other: _np(self.index.reshape(-1)[there]),
            "weight": _np(self.weight.reshape(-1)[there]),
        }

    def draw(self, ax: Axes) -> None:
        """Points (query, key), darker for more weight, over all heads."""
        table = self.columns()
        first = table["batch"] == 0
        query, key, weight = (table[name][first] for name in ("query", "key", "weight"))
        statistics.draw_links(ax, query, key, weight, self.name)

    @property
    def marks(self) -> int:
        """Points, of every batch row, since all are looked through."""
        return self.index.numel()

    def _rows(self) -> int:
        return int((self.index >= 0).sum())


@dataclass(frozen=True, repr=False)
class PooledMap(Values):
    """The attention matrix pooled into cells: `values` (B, H, R, C); NaN (0 for kind "sum") where no pair may attend.

    Row cell r holds queries query_edges[r]..query_edges[r + 1], and columns likewise; `kind` "sum", "mean" or "max".
    """

    query_edges: Tensor
    key_edges: Tensor
    kind: str

    def columns(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        """batch, head, query and key where the cell begins, and the value."""
        table = _long({"batch": 0, "head": 1, "query": 2, "key": 3}, {self.name: self.values}, rows)
        table["query"] = self.query_edges.cpu().numpy()[table["query"]]
        table["key"] = self.key_edges.cpu().numpy()[table["key"]]
        return table

    def draw(self, ax: Axes) -> None:
        """The mean over heads on a logarithmic scale, masked cells apart."""
        mean = _np(self.values[0].float().mean(0))
        statistics.draw_map(ax, mean, _np(self.query_edges), _np(self.key_edges), self.kind, self.name)

    @property
    def marks(self) -> int:
        """Cells of the mean over heads."""
        return self.values.shape[-2:].numel()


@dataclass(frozen=True, repr=False)
class Histogram(Statistic):
    """How the weights are spread over bins: `edges` (bins + 1,), `mass` and `count` (B, H, bins): the weights' sum and
    their number."""

    edges: Tensor
    mass: Tensor
    count: Tensor

    def share_for(self, mass: float) -> Tensor:
        """(B, H): share of all pairs, largest first, whose weights hold `mass` of the whole; to a bin's precision, from
        above. For histograms of the weights themselves."""
        cumulated = self.mass.flip(-1).cumsum(-1)
        needed = (cumulated < mass * cumulated[..., -1:]).sum(-1, keepdim=True).clamp(max=cumulated.shape[-1] - 1)
        counts = self.count.flip(-1).cumsum(-1)
        return (counts.gather(-1, needed) / counts[..., -1:]).squeeze(-1)

    def columns(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        """batch, head, the bin's lower edge, mass, count."""
        table = _long({"batch": 0, "head": 1, "from": 2}, {"mass": self.mass, "count": self.count}, rows)
        table["from"] = self.edges.cpu().numpy()[table["from"]]
        return table

    def draw(self, ax: Axes) -> None:
        """Mass of each bin, a line for each head."""
        statistics.draw_histogram(ax, _np(self.edges), _np(self.mass[0]), self.name)


@dataclass(frozen=True, repr=False)
class Weights(Values):
    """Attention weights themselves: `values` (B, H, R, C) of queries `queries` (R,) and keys `keys` (C,)."""

    queries: Tensor
    keys: Tensor

    def columns(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        """batch, head, query, key, weight."""
        table = _long({"batch": 0, "head": 1, "query": 2, "key": 3}, {"weight": self.values}, rows)
        table["query"] = self.queries.cpu().numpy()[table["query"]]
        table["key"] = self.keys.cpu().numpy()[table["key"]]
        return table

    def draw(self, ax: Axes) -> None:
        """The mean over heads."""
        statistics.draw_weights(ax, _np(self.values[0].float().mean(0)), self.name)

    @property
    def marks(self) -> int:
        """Cells of the mean over heads."""
        return self.values.shape[-2:].numel()


def _long(axes: dict[str, int], values: dict[str, Tensor], rows: int | None) -> dict[str, NDArray[Any]]:
    """Arrays of one shape as columns, after a column for each axis; the first `rows` where given."""
    shape = tuple(next(iter(values.values())).shape)
    count = prod(shape)
    if rows is not None and rows < count:
        # the rest is not even copied: a notebook shows a few rows of what may be large
        places = np.unravel_index(np.arange(rows), shape)
        return {name: places[axis] for name, axis in axes.items()} | {
            name: _np(tensor[tuple(map(torch.from_numpy, places))]) for name, tensor in values.items()
        }
    table: dict[str, NDArray[Any]] = {}
    for name, axis in axes.items():
        where = np.arange(shape[axis]).reshape([-1 if place == axis else 1 for place in range(len(shape))])
        table[name] = np.broadcast_to(where, shape).ravel()
    return table | {name: _np(tensor).ravel() for name, tensor in values.items()}


def _np(tensor: Tensor) -> NDArray[Any]:
    return (tensor if tensor.dtype == torch.int64 else tensor.float()).detach().cpu().numpy()
