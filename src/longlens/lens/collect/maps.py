"""Maps: the whole matrix pooled to a chosen size, histograms of it, and its exact weights at chosen places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longlens.errors import InputError
from longlens.lens.block import Block, Extent, Places
from longlens.lens.collect.collector import Collector, State, Sums
from longlens.lens.results import Histogram, PooledMap, Weights
from longlens.ops.tiles.index import Index, expanded

KINDS = ("mean", "sum", "max")


@dataclass(frozen=True)
class Pooled(Collector):
    """The matrix in at most `size` x `size` cells of equal width: `kind` "mean" over the pairs that may attend, "sum",
    or "max". Sums and maxima of cells compose to those of coarser cells."""

    size: int = 256
    kind: str = "mean"

    def __post_init__(self) -> None:
        if self.size < 1 or self.kind not in KINDS:
            raise InputError(f"expected size >= 1 and kind one of {KINDS}, got {self.size} and {self.kind!r}")

    @property
    def name(self) -> str:
        return "pooled" if self.kind == "mean" else f"pooled_{self.kind}"

    def start(self, extent: Extent) -> State[PooledMap]:
        return _Pooled(self, extent)


class _Pooled(Sums[PooledMap]):
    def __init__(self, collector: Pooled, extent: Extent) -> None:
        self.collector = collector
        self.widths = [-(-count // collector.size) for count in (extent.queries, extent.keys)]
        cells = tuple(
            -(-count // width) for count, width in zip((extent.queries, extent.keys), self.widths, strict=True)
        )
        super().__init__(extent, mass=cells, **({"count": cells} if collector.kind != "sum" else {}))

    def update(self, block: Block) -> None:
        rows, (row_width, key_width) = block.absolute_rows(), self.widths
        row_cells = expanded(rows, len(block.e), block.e.device) // row_width
        key_cells = expanded(block.absolute_keys(), len(block.e), block.e.device) // key_width
        present = _cells_of(rows, row_width, row_cells)
        member = (row_cells.unsqueeze(1) == present.view(1, -1, 1)).to(block.e.dtype)
        if self.collector.kind == "max":
            values = _largest_of(block.weights, rows, row_width, member)
        else:
            values = torch.bmm(member * block.inverse.transpose(1, 2), block.e)
        self._add("mass", block, present, key_cells, values)
        if "count" in self.sums:
            if block.allowed is None:
                pairs = member.sum(-1, keepdim=True).expand(-1, -1, block.e.shape[-1])
            else:
                pairs = torch.bmm(member, block.allowed.to(member.dtype))
            self._add("count", block, present, key_cells, pairs)

    def _add(self, name: str, block: Block, present: Tensor, key_cells: Tensor, values: Tensor) -> None:
        """Add, or for maxima join, `values` (heads, cells of rows, keys)."""
        cells = self.sums[name][block.heads].index_select(1, present)
        places = key_cells.unsqueeze(1).expand_as(values)
        if name == "mass" and self.collector.kind == "max":
            cells.scatter_reduce_(2, places, values, "amax")
        else:
            cells.scatter_add_(2, places, values)
        self.sums[name][block.heads].index_copy_(1, present, cells)

    def merge(self, other: _Pooled) -> None:
        if self.collector.kind == "max":
            self.sums["mass"] = torch.maximum(self.sums["mass"], other.sums["mass"])
            self.sums["count"] += other.sums["count"]
        else:
            super().merge(other)

    def result(self) -> PooledMap:
        values = self.of("mass")
        if self.collector.kind == "mean":
            values = values / self.of("count")
        elif self.collector.kind == "max":
            values = values.masked_fill(self.of("count") == 0, torch.nan)
        counts = (self.extent.queries, self.extent.keys)
        edges = [
            torch.arange(cells + 1).mul(width).clamp(max=count)
            for cells, width, count in zip(values.shape[2:], self.widths, counts, strict=True)
        ]
        return PooledMap(self.collector.name, values, edges[0], edges[1], self.collector.kind)


def _cells_of(rows: Index, width: int, row_cells: Tensor) -> Tensor:
    """The cells that have a row of the block, each once, in order."""
    if isinstance(rows, slice) and (rows.step or 1) <= width:
        # without a look at the numbers, which would stall an accelerator
        last = range(rows.start, rows.stop, rows.step or 1)[-1]
        return torch.arange(rows.start // width, last // width + 1, device=row_cells.device)
    return torch.unique(row_cells)


def _largest_of(weights: Tensor, rows: Index, width: int, member: Tensor) -> Tensor:
    """The largest weight of each cell of rows: (heads, cells, keys); `member` (heads, cells, rows) says who is in."""
    if isinstance(rows, slice) and rows.step in (None, 1):
        before = rows.start % width
        whole = torch.nn.functional.pad(weights, (0, 0, before, -(before + weights.shape[1]) % width))
        return whole.unflatten(1, (-1, width)).amax(2)
    return torch.stack([(weights * one.unsqueeze(-1)).amax(-2) for one in member.unbind(1)], 1)


@dataclass(frozen=True)
class DistanceHistogram(Collector):
    """Sum of p_ij by signed distance j - i in tokens: a bin for 0, then bins whose width doubles on each side, 1, 2-3,
    4-7, ... up to 2^`octaves`."""

    octaves: int = 17

    @property
    def name(self) -> str:
        return "distance_histogram"

    def start(self, extent: Extent) -> State[Histogram]:
        return _DistanceHistogram(self, extent)


class _Binned(Sums[Histogram]):
    """Mass and number of pairs by bin."""

    together: ClassVar[bool] = True
    collector: Collector
    edges: Tensor

    def add(self, block: Block, bins: Tensor) -> None:
        """`bins` broadcasts to (heads, rows, keys)."""
        flat = bins.expand(block.e.shape).flatten(1)
        self.sums["mass"][block.heads].scatter_add_(1, flat, block.weights.flatten(1))
        ones = torch.ones_like(block.e) if block.allowed is None else block.allowed.to(block.e.dtype)
        self.sums["count"][block.heads].scatter_add_(1, flat, ones.flatten(1))

    def absorb(self, other: _Binned, places: Places) -> None:
        for name, tensor in other.sums.items():
            self.sums[name][places.heads] += tensor.unflatten(0, (places.sequences, -1)).sum(0)

    def result(self) -> Histogram:
        return Histogram(self.collector.name, self.edges, self.of("mass"), self.of("count"))


class _DistanceHistogram(_Binned):
    def __init__(self, collector: DistanceHistogram, extent: Extent) -> None:
        powers = 2.0 ** torch.arange(collector.octaves + 1)
        # distances are whole numbers: the edges of the bins are halfway between two of them
        self.edges = torch.cat([-powers.flip(0) + 0.5, powers - 0.5])
        bins = len(self.edges) - 1
        super().__init__(extent, mass=(bins,), count=(bins,))
        self.collector = collector

    def update(self, block: Block) -> None:
        signed = block.key_positions.unsqueeze(-2) - block.query_positions.unsqueeze(-1)
        bins = torch.bucketize(signed.to(torch.float32), self.edges.to(signed.device)) - 1
        self.add(block, bins.clamp(0, len(self.edges) - 2))


@dataclass(frozen=True)
class WeightHistogram(Collector):
    """Weights by their decimal logarithm, `per_decade` bins to a power of ten from 1e-12 to 1; smaller weights are in
    the first bin. `result.share_for(0.9)` measures how sparse the attention is."""

    per_decade: int = 10

    @property
    def name(self) -> str:
        return "weight_histogram"

    def start(self, extent: Extent) -> State[Histogram]:
        return _WeightHistogram(self, extent)


class _WeightHistogram(_Binned):
    def __init__(self, collector: WeightHistogram, extent: Extent) -> None:
        self.edges = torch.linspace(-12, 0, 12 * collector.per_decade + 1)
        bins = len(self.edges) - 1
        super().__init__(extent, mass=(bins,), count=(bins,))
        self.collector = collector

    def update(self, block: Block) -> None:
        # a NaN weight counts in the first bin, whose mass is then NaN
        steps = block.weights.log10().add_(12).mul_((len(self.edges) - 1) / 12).nan_to_num_(nan=0.0)
        self.add(block, steps.clamp_(0, len(self.edges) - 2).long())


@dataclass(frozen=True)
class Cells(Collector):
    """p_ij itself for chosen queries and keys (None means all of them), exact: N numbers for each chosen query.

    Raises `InputError` where both are None, and, once the extent is known, for numbers that do not exist.
    """

    queries: tuple[int, ...] | None = None
    keys: tuple[int, ...] | None = None
    label: str = "cells"

    def __post_init__(self) -> None:
        if self.queries is None and self.keys is None:
            raise InputError("expected queries or keys to be named: all weights would be N x N; see Pooled")

    @property
    def name(self) -> str:
        return self.label

    def start(self, extent: Extent) -> State[Weights]:
        return _Cells(self, extent)


class _Cells(Sums[Weights]):
    def __init__(self, collector: Cells, extent: Extent) -> None:
        chosen = []
        for named, count, what in (
            (collector.queries, extent.queries, "queries"),
            (collector.keys, extent.keys, "keys"),
        ):
            if named is not None and any(not 0 <= place < count for place in named):
                raise InputError(f"expected {what} in 0..{count - 1}, got {named}")
            chosen.append(torch.tensor(range(count) if named is None else named, dtype=torch.int64))
        self.queries, self.keys = chosen
        # a repeated number is collected once
        distinct = [torch.unique(index) for index in chosen]
        super().__init__(extent, weights=tuple(len(index) for index in distinct))
        self.collector = collector
        # the place of each token among the distinct numbers, -1 for tokens that were not chosen
        self.place = []
        for index, count in zip(distinct, (extent.queries, extent.keys), strict=True):
            place = torch.full((count,), -1)
            place[index] = torch.arange(len(index))
            self.place.append(place.to(extent.device))

    def update(self, block: Block) -> None:
        heads = len(block.e)
        rows, keys = (
            place[expanded(index, heads, block.e.device)]
            for place, index in zip(self.place, (block.absolute_rows(), block.absolute_keys()), strict=True)
        )
        if not bool((rows >= 0).any()) or not bool((keys >= 0).any()):
            return
        target = self.sums["weights"][block.heads]
        for head in range(heads):
            in_rows, in_keys = (rows[head] >= 0).nonzero().squeeze(1), (keys[head] >= 0).nonzero().squeeze(1)
            weights = block.weights[head][in_rows.unsqueeze(1), in_keys]
            target[head].index_put_((rows[head][in_rows].unsqueeze(1), keys[head][in_keys]), weights, accumulate=True)

    def result(self) -> Weights:
        rows, columns = (place.cpu()[index] for place, index in zip(self.place, (self.queries, self.keys), strict=True))
        weights = self.of("weights")
        weights = weights[..., rows.to(weights.device), :][..., columns.to(weights.device)]
        return Weights(self.collector.name, weights, self.queries, self.keys)
