"""What collectors return: frozen values that go to a table, a file or a figure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Result(ABC):
    """One statistic of one layer. `name` is that of its collector."""

    name: str

    @property
    def data(self) -> Any:
        """What `seen.NAME[layer]` gives: the tensor where there is but one, the result itself otherwise."""
        return self

    @abstractmethod
    def columns(self) -> dict[str, NDArray[Any]]:
        """Long form: columns of equal length, batch row and head first."""

    @abstractmethod
    def draw(self, ax: Axes) -> None:
        """Draw batch row 0 on `ax`, heads as lines or averaged."""

    def to_frame(self) -> Any:
        """A pandas DataFrame in long form; needs pandas."""
        try:
            import pandas as pd
        except ImportError:
            raise InputError("expected pandas to be installed for to_frame(); install it, or use columns()") from None
        return pd.DataFrame(self.columns())

    def save(self, path: str | Path) -> Path:
        """Write the long form: .parquet, .csv or .npz, as the path ends."""
        path = Path(path)
        table = self.columns()
        if path.suffix == ".npz":
            np.savez_compressed(path, **table)  # type: ignore[arg-type]
            return path
        if path.suffix not in (".parquet", ".csv"):
            raise InputError(f"expected a path that ends in .parquet, .csv or .npz, got {path}")
        import pyarrow as pa

        arrow = pa.table(table)
        if path.suffix == ".csv":
            from pyarrow import csv

            csv.write_csv(arrow, path)
        else:
            from pyarrow import parquet

            parquet.write_table(arrow, path)
        return path

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw batch row 0; returns the axes. Needs matplotlib (extra `plot`)."""
        if ax is None:
            try:
                from matplotlib import pyplot as plt
            except ImportError:
                raise InputError("expected matplotlib to be installed for plot(); install longlens[plot]") from None
            _, ax = plt.subplots(layout="constrained")
        self.draw(ax)
        return ax


@dataclass(frozen=True)
class RowValues(Result):
    """One number for each query: `values` (B, H, Nq)."""

    values: Tensor

    @property
    def data(self) -> Tensor:
        """`values`."""
        return self.values

    def columns(self) -> dict[str, NDArray[Any]]:
        """batch, head, query, and the statistic under its name."""
        return _long({"batch": 0, "head": 1, "query": 2}, {self.name: self.values})

    def draw(self, ax: Axes) -> None:
        """A line for each head."""
        _lines(ax, self.values[0], "query", self.name)


@dataclass(frozen=True)
class ColumnValues(Result):
    """One number for each key: `values` (B, H, Nk)."""

    values: Tensor

    @property
    def data(self) -> Tensor:
        """`values`."""
        return self.values

    def columns(self) -> dict[str, NDArray[Any]]:
        """batch, head, key, and the statistic under its name."""
        return _long({"batch": 0, "head": 1, "key": 2}, {self.name: self.values})

    def draw(self, ax: Axes) -> None:
        """A line for each head."""
        _lines(ax, self.values[0], "key", self.name)


@dataclass(frozen=True)
class TopK(Result):
    """The largest weights of each query (`axis` "query") or key, largest first.

    `index` (B, H, N, k) int64: the key (or query), -1 where fewer than k exist; `weight` (B, H, N, k), 0 there.
    """

    index: Tensor
    weight: Tensor
    axis: str = "query"

    def columns(self) -> dict[str, NDArray[Any]]:
        """batch, head, query (or key), place from 0, the other's index, weight; absent places are left out."""
        other = "key" if self.axis == "query" else "query"
        table = _long({"batch": 0, "head": 1, self.axis: 2, "place": 3}, {other: self.index, "weight": self.weight})
        there = table[other] >= 0
        return {name: column[there] for name, column in table.items()}

    def draw(self, ax: Axes) -> None:
        """Points (query, key), darker for more weight, over all heads."""
        table = self.columns()
        first = table["batch"] == 0
        order = np.argsort(table["weight"][first])
        places = {name: column[first][order] for name, column in table.items()}
        ax.scatter(places["key"], places["query"], c=places["weight"], s=2, cmap="viridis", vmin=0)
        ax.invert_yaxis()
        ax.set(xlabel="key", ylabel="query", title=self.name)


@dataclass(frozen=True)
class PooledMap(Result):
    """The attention matrix pooled into cells: `values` (B, H, R, C); NaN (0 for kind "sum") where no pair may attend.

    Row cell r holds queries query_edges[r]..query_edges[r + 1], and columns likewise; `kind` "sum", "mean" or "max".
    """

    values: Tensor
    query_edges: Tensor
    key_edges: Tensor
    kind: str

    def columns(self) -> dict[str, NDArray[Any]]:
        """batch, head, query and key where the cell begins, and the value."""
        table = _long({"batch": 0, "head": 1, "query": 2, "key": 3}, {self.name: self.values})
        table["query"] = self.query_edges.cpu().numpy()[table["query"]]
        table["key"] = self.key_edges.cpu().numpy()[table["key"]]
        return table

    def draw(self, ax: Axes) -> None:
        """The mean over heads on a logarithmic scale, masked cells apart."""
        from matplotlib.colors import LogNorm

        mean = self.values[0].float().mean(0).cpu().numpy()
        shown = np.ma.masked_invalid(np.where(mean > 0, mean, np.nan))
        edges = [edge.cpu().numpy() for edge in (self.key_edges, self.query_edges)]
        low = float(shown.min()) if shown.count() else 1e-6
        high = float(shown.max()) if shown.count() else 1.0
        norm = LogNorm(max(low, high * 1e-6), high)
        ax.set_facecolor("0.85")
        mesh = ax.pcolormesh(*edges, shown, norm=norm, cmap="magma_r", rasterized=True)
        ax.invert_yaxis()
        ax.set(xlabel="key", ylabel="query", title=f"{self.name} ({self.kind})", aspect="equal")
        ax.figure.colorbar(mesh, ax=ax, label=f"{self.kind} of weights")


@dataclass(frozen=True)
class Histogram(Result):
    """How the weights are spread over bins: `edges` (bins + 1,), `mass` and `count` (B, H, bins): the weights' sum and
    their number."""

    edges: Tensor
    mass: Tensor
    count: Tensor

    def share_for(self, mass: float) -> Tensor:
        """(B, H): share of all pairs, largest first, whose weights hold `mass` of the whole; to a bin's precision, from
        above. For histograms of the weights themselves."""
        held = self.mass.flip(-1).cumsum(-1)
        needed = (held < mass * held[..., -1:]).sum(-1, keepdim=True).clamp(max=held.shape[-1] - 1)
        counts = self.count.flip(-1).cumsum(-1)
        return (counts.gather(-1, needed) / counts[..., -1:]).squeeze(-1)

    def columns(self) -> dict[str, NDArray[Any]]:
        """batch, head, the bin's lower edge, mass, count."""
        table = _long({"batch": 0, "head": 1, "from": 2}, {"mass": self.mass, "count": self.count})
        table["from"] = self.edges.cpu().numpy()[table["from"]]
        return table

    def draw(self, ax: Axes) -> None:
        """Mass of each bin, a line for each head."""
        edges = self.edges.cpu().numpy()
        for head, mass in enumerate(self.mass[0].cpu().numpy()):
            ax.stairs(mass, edges, label=f"head {head}")
        ax.set(xlabel=self.name, ylabel="mass")


@dataclass(frozen=True)
class Weights(Result):
    """Attention weights themselves: `values` (B, H, R, C) of queries `queries` (R,) and keys `keys` (C,)."""

    values: Tensor
    queries: Tensor
    keys: Tensor

    @property
    def data(self) -> Tensor:
        """`values`."""
        return self.values

    def columns(self) -> dict[str, NDArray[Any]]:
        """batch, head, query, key, weight."""
        table = _long({"batch": 0, "head": 1, "query": 2, "key": 3}, {"weight": self.values})
        table["query"] = self.queries.cpu().numpy()[table["query"]]
        table["key"] = self.keys.cpu().numpy()[table["key"]]
        return table

    def draw(self, ax: Axes) -> None:
        """The mean over heads."""
        mesh = ax.imshow(self.values[0].float().mean(0).cpu().numpy(), aspect="auto", cmap="magma_r")
        ax.set(xlabel="key", ylabel="query", title=self.name)
        ax.figure.colorbar(mesh, ax=ax, label="weight")


def _long(axes: dict[str, int], values: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Arrays of one shape as columns, after a column for each axis."""
    shape = next(iter(values.values())).shape
    table: dict[str, NDArray[Any]] = {}
    for name, axis in axes.items():
        where = np.arange(shape[axis]).reshape([-1 if place == axis else 1 for place in range(len(shape))])
        table[name] = np.broadcast_to(where, tuple(shape)).ravel()
    for name, tensor in values.items():
        kind = tensor if tensor.dtype == torch.int64 else tensor.float()
        table[name] = kind.detach().cpu().numpy().ravel()
    return table


def _lines(ax: Axes, values: Tensor, axis: str, name: str) -> None:
    for head, line in enumerate(values.float().cpu().numpy()):
        ax.plot(line, lw=0.8, label=f"head {head}")
    ax.set(xlabel=axis, ylabel=name.replace("_", " "))
    if len(values) <= 12:
        ax.legend(fontsize=7)
