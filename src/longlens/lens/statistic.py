"""What every statistic of the lens can do: become a table, a file, a figure, and show itself in a notebook.

seen.entropy[3]                 # the statistic of layer 3; its tensor is .values
seen.entropy[3].to_frame()      # batch, head, query, entropy
seen.entropy.to_frame()         # the same of every layer, with a column `layer`
polars.DataFrame(seen.entropy)  # the same for any reader of Arrow
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.errors import InputError
from longlens.report import figures, statistics, tables
from longlens.report.arrow import ArrowTable, arrow_table

if TYPE_CHECKING:
    from longlens.report.figures import Axes

# marks of a figure that a notebook shows unasked; drawing more takes longer than a cell should
DRAWN = 2**16


@dataclass(frozen=True, repr=False)
class Statistic(ArrowTable, ABC):
    """One statistic of one layer. `name` is that of its collector."""

    name: str

    @abstractmethod
    def columns(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        """Long form: columns of equal length, batch row and head first; at most the first `rows` rows where given."""

    @abstractmethod
    def draw(self, ax: Axes) -> None:
        """Draw batch row 0 on `ax`, heads as lines or averaged."""

    @property
    def marks(self) -> int:
        """How many points, cells or bars `draw` makes."""
        return max((prod(tensor.shape[1:]) for tensor in self._tensors().values()), default=0)

    def to_frame(self) -> Any:
        """A pandas DataFrame in long form; `InputError` names the extra where pandas is missing."""
        return tables.to_frame(self.columns())

    def save(self, path: str | Path) -> Path:
        """Write the long form: .parquet, .csv or .npz, as the path ends."""
        path = Path(path)
        table = self.columns()
        if path.suffix == ".npz":
            np.savez_compressed(path, **table)  # type: ignore[arg-type]
            return path
        if path.suffix not in (".parquet", ".csv"):
            raise InputError(f"expected a path that ends in .parquet, .csv or .npz, got {path}")
        arrow = arrow_table(table)
        if path.suffix == ".csv":
            from pyarrow import csv

            csv.write_csv(arrow, path)
        else:
            from pyarrow import parquet

            parquet.write_table(arrow, path)
        return path

    def _arrow(self) -> Any:
        return arrow_table(self.columns())

    def plot(self, ax: Axes | None = None) -> Any:
        """Draw batch row 0; returns the axes. Needs matplotlib (extra `plot`)."""
        ax = figures.new_axes() if ax is None else ax
        self.draw(ax)
        return ax

    def _tensors(self) -> dict[str, Tensor]:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}

    @property
    def arrays(self) -> str:
        """Its tensors in words: values (1, 4, 122) float32."""
        return ", ".join(
            f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in self._tensors().items()
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: {self.arrays})"

    def _repr_html_(self) -> str:
        return tables.html_table(
            self.columns(tables.ROWS), title=f"{self.name}: {self.arrays}", total=self._rows(), picture=self._picture()
        )

    def _rows(self) -> int:
        """How many rows the long form has, at most."""
        return max((tensor.numel() for tensor in self._tensors().values()), default=0)

    def _picture(self) -> str | None:
        """A small figure for a notebook; none without matplotlib, or where drawing it would take long."""
        if self.marks > DRAWN or not figures.has_matplotlib():
            return None
        figure = figures.new_figure((5.5, 2.8))
        self.draw(figure.add_subplot())
        return figures.inline(figure)


@dataclass(frozen=True, repr=False)
class Values(Statistic):
    """A statistic that is one tensor, `values` (B, H, ...). It is indexed as the tensor is, and numpy takes it for one;
    to compute with it, take `values`."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of `values`."""
        return self.values.shape

    def __getitem__(self, index: Any) -> Tensor:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values.detach().cpu().numpy(), dtype=dtype, copy=copy)


@dataclass(frozen=True, repr=False)
class Layered(Statistic):
    """One statistic in every layer: `layered[layer]`."""

    results: Mapping[int, Statistic]

    def __getitem__(self, layer: int) -> Any:
        if layer not in self.results:
            raise InputError(f"expected a layer that was seen, {sorted(self.results)}, got {layer!r}")
        return self.results[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def columns(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        """layer, and then as the results say."""
        parts: list[dict[str, NDArray[Any]]] = []
        left = rows
        for layer, result in self.results.items():
            table = result.columns(left)
            count = len(next(iter(table.values())))
            parts.append({"layer": np.full(count, layer)} | table)
            left = None if left is None else left - count
            if left == 0:
                break
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def draw(self, ax: Axes) -> None:
        """The only layer; several layers are drawn by `plot`."""
        if len(self.results) != 1:
            raise InputError(
                f"expected one layer to draw on one axes, got {sorted(self.results)}; use [layer].plot(ax)"
            )
        next(iter(self.results.values())).draw(ax)

    def plot(self, ax: Axes | None = None) -> Any:
        """One panel for each layer; returns their axes (one axes for one layer). Needs matplotlib (extra `plot`)."""
        if ax is not None or len(self.results) == 1:
            return super().plot(ax)
        panels = figures.new_axes(len(self.results))
        for panel, (layer, result) in zip(panels.flat, self.results.items(), strict=False):
            result.draw(panel)
            panel.set_title(f"{self.name.replace('_', ' ')}, layer {layer}")
        return panels

    @property
    def marks(self) -> int:
        """Those of all layers."""
        return sum(result.marks for result in self.results.values())

    @property
    def arrays(self) -> str:
        """The layers, and the tensors of the first."""
        first = next(iter(self.results.values()))
        return f"layers {figures.span(list(self.results))}; each {first.arrays}"

    def _rows(self) -> int:
        return sum(result._rows() for result in self.results.values())

    def _picture(self) -> str | None:
        """The mean over tokens by layer and head, where there is one number for each token."""
        results = list(self.results.values())
        if len(results) == 1:
            return results[0]._picture()
        by_token = [result.values[0] for result in results if isinstance(result, Values) and result.values.ndim == 3]
        if len(by_token) < len(results) or len({len(values) for values in by_token}) > 1:
            return None
        if not figures.has_matplotlib():
            return None
        figure = figures.new_figure((5.5, 2.8))
        means = np.stack([values.float().nanmean(-1).cpu().numpy() for values in by_token])
        statistics.draw_heads(figure.add_subplot(), means, list(self.results), self.name)
        return figures.inline(figure)


def html_of_call(results: Mapping[int, Mapping[str, Statistic]], title: str) -> str:
    """The statistics of one call of a model, {layer: {name: statistic}}, as a small HTML table: a row for each."""
    layers = sorted(results)
    names = dict.fromkeys(name for layer in layers for name in results[layer])
    firsts = {name: next(results[layer][name] for layer in layers if name in results[layer]) for name in names}
    columns = {
        "statistic": list(names),
        "layers": [figures.span([layer for layer in layers if name in results[layer]]) for name in names],
        "each": [statistic.arrays for statistic in firsts.values()],
    }
    return tables.html_table(columns, title=title, total=len(names))
