"""Statistics of columns: the attention that each key receives. Sums run over the queries i that may attend to key j."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longlens.errors import InputError, UnsupportedError
from longlens.lens.block import LN2, Block, Extent, Places
from longlens.lens.collect.collector import Collector, State, Sums, best_of
from longlens.lens.results import ColumnValues, TopK
from longlens.ops.tiles.index import add, expanded, maximise, put, take


class _ColumnSums(Sums[ColumnValues]):
    together: ClassVar[bool] = True

    def __init__(self, collector: Collector, extent: Extent, *names: str) -> None:
        super().__init__(extent, **dict.fromkeys(names, (extent.keys,)))
        self.collector = collector

    def add(self, block: Block, name: str, values: Tensor) -> None:
        """`values` (heads, keys)."""
        add(self.sums[name], block.heads, block.absolute_keys(), values)

    def values(self) -> Tensor:
        """(B, H, Nk): the first sum, unless a subclass makes more of it."""
        return self.of(next(iter(self.sums)))

    def result(self) -> ColumnValues:
        return ColumnValues(self.collector.name, self.values())


def _received(block: Block) -> Tensor:
    """(heads, keys): sum_i p_ij over the block's queries, as one product, so that p itself is never made."""
    return torch.bmm(block.inverse.transpose(1, 2), block.e).squeeze(1)


@dataclass(frozen=True)
class Received(Collector):
    """c_j = sum_i p_ij, the attention that a key receives; 1 on average where Nq = Nk."""

    @property
    def name(self) -> str:
        return "received"

    def start(self, extent: Extent) -> State[ColumnValues]:
        return _Received(self, extent, "received")


class _Received(_ColumnSums):
    def update(self, block: Block) -> None:
        self.add(block, "received", _received(block))


@dataclass(frozen=True)
class ReceivedMean(Collector):
    """c_j divided by the number of queries that may attend to j, which under a causal mask falls along the sequence;
    NaN for a key that no query may attend to."""

    @property
    def name(self) -> str:
        return "received_mean"

    def start(self, extent: Extent) -> State[ColumnValues]:
        return _ReceivedMean(self, extent, "received", "count")


class _ReceivedMean(_ColumnSums):
    def update(self, block: Block) -> None:
        self.add(block, "received", _received(block))
        count = _pairs(block).sum(-2)
        self.add(block, "count", count)

    def values(self) -> Tensor:
        return self.of("received") / self.of("count")


def _pairs(block: Block) -> Tensor:
    """(heads, rows, keys) of 0 and 1, or one number for all of it as a view: pairs that may attend."""
    if block.allowed is None:
        return block.e.new_ones(()).expand_as(block.e)
    return block.allowed.to(block.e.dtype)


@dataclass(frozen=True)
class ReceivedMax(Collector):
    """max_i p_ij: the largest weight on each key; 0 for a key that no query may attend to."""

    @property
    def name(self) -> str:
        return "received_max"

    def start(self, extent: Extent) -> State[ColumnValues]:
        return _ReceivedMax(self, extent, "most")


class _ReceivedMax(_ColumnSums):
    def update(self, block: Block) -> None:
        maximise(self.sums["most"], block.heads, block.absolute_keys(), block.weights.amax(-2))

    def merge(self, other: _ReceivedMax) -> None:
        self.sums["most"] = torch.maximum(self.sums["most"], other.sums["most"])


@dataclass(frozen=True)
class ColumnEntropy(Collector):
    """Entropy, in nats, of p_ij / c_j over the queries: how many queries key j's attention comes from.

    log c_j - (1 / c_j) sum_i p_ij log p_ij; 0 for a key that receives nothing.
    """

    @property
    def name(self) -> str:
        return "column_entropy"

    def start(self, extent: Extent) -> State[ColumnValues]:
        return _ColumnEntropy(self, extent, "received", "surprise")


class _ColumnEntropy(_ColumnSums):
    def update(self, block: Block) -> None:
        self.add(block, "received", _received(block))
        # -p log p = p (log l - x), which is never negative
        product = torch.sub(block.log_total, block.exponents).mul_(block.e)
        self.add(block, "surprise", torch.bmm(block.inverse.transpose(1, 2), product).squeeze(1) * LN2)

    def values(self) -> Tensor:
        received = self.of("received")
        entropy = received.log() + self.of("surprise") / received
        return torch.where(received > 0, entropy, 0.0).clamp(min=0.0)


@dataclass(frozen=True)
class TopQueries(Collector):
    """For each key the `count` queries with the largest p_ij, and the weights."""

    count: int = 8

    @property
    def name(self) -> str:
        return "top_queries"

    def start(self, extent: Extent) -> State[TopK]:
        return _TopQueries(self, extent)


class _TopQueries(State[TopK]):
    together: ClassVar[bool] = True

    def __init__(self, collector: TopQueries, extent: Extent) -> None:
        if collector.count < 1:
            raise InputError(f"expected a count of at least 1, got {collector.count}")
        self.collector, self.extent = collector, extent
        self.weight = extent.zeros(extent.keys, collector.count).fill_(-1.0)
        self.index = torch.full(self.weight.shape, -1, dtype=torch.int64, device=extent.device)

    def update(self, block: Block) -> None:
        if isinstance(block.keys, Tensor) and block.keys.ndim == 2:
            raise UnsupportedError("top_queries cannot follow lsh, whose keys differ by head; use received_max")
        weights = block.weights if block.allowed is None else block.weights.masked_fill(~block.allowed, -1.0)
        best, places = torch.topk(weights, min(self.collector.count, weights.shape[-2]), -2)
        best, places = best.transpose(1, 2), places.transpose(1, 2)
        queries = expanded(block.absolute_rows(), len(best), best.device)
        index = queries.unsqueeze(1).expand(-1, best.shape[1], -1).gather(-1, places).masked_fill(best < 0, -1)
        # no key occurs twice in a block, so its entries can be read, compared and written back
        keys = block.absolute_keys()
        best = torch.cat([take(self.weight, block.heads, keys), best], -1)
        index = torch.cat([take(self.index, block.heads, keys), index], -1)
        best, index = best_of(best, index, self.collector.count)
        put(self.weight, block.heads, keys, best)
        put(self.index, block.heads, keys, index)

    def absorb(self, other: _TopQueries, places: Places) -> None:
        places.put(self.weight, other.weight)
        places.put_numbers(self.index, other.index)

    def merge(self, other: _TopQueries) -> None:
        weight, index = torch.cat([self.weight, other.weight], -1), torch.cat([self.index, other.index], -1)
        self.weight, self.index = best_of(weight, index, self.collector.count)

    def result(self) -> TopK:
        weight = self.extent.by_head(self.weight.clamp(min=0.0))
        return TopK(self.collector.name, self.extent.by_head(self.index), weight, "key")
