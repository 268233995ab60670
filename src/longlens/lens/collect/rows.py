"""Statistics of rows: what each query attends to. p_ij = e^(s_ij - lse_i); every sum runs over the keys j."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longlens.errors import InputError
from longlens.lens.block import LN2, Block, Extent, Places
from longlens.lens.collect.collector import Collector, State, Sums, best_of
from longlens.lens.results import RowValues, TopK
from longlens.ops.tiles.index import add, expanded, put, take


class _RowSums(Sums[RowValues]):
    """Sums over keys, one for each query and name; subclasses say what is added and what is made of it."""

    together: ClassVar[bool] = True

    def __init__(self, collector: Collector, extent: Extent, *names: str) -> None:
        super().__init__(extent, **dict.fromkeys(names, (extent.queries,)))
        self.collector = collector

    def add(self, block: Block, name: str, values: Tensor) -> None:
        """`values` (heads, rows)."""
        add(self.sums[name], block.heads, block.absolute_rows(), values)

    def values(self) -> Tensor:
        """(B, H, Nq): the first sum, unless a subclass makes more of it."""
        return self.of(next(iter(self.sums)))

    def result(self) -> RowValues:
        return RowValues(self.collector.name, self.values())


@dataclass(frozen=True)
class LogSumExp(Collector):
    """lse_i = log sum_j e^(s_ij), natural logarithm; -inf for a query with nothing to attend to."""

    @property
    def name(self) -> str:
        return "log_sum_exp"

    def start(self, extent: Extent) -> State[RowValues]:
        return _LogSumExp(self, extent)


class _LogSumExp(State[RowValues]):
    together: ClassVar[bool] = True

    def __init__(self, collector: Collector, extent: Extent) -> None:
        self.collector, self.extent = collector, extent
        self.lse = extent.zeros(extent.queries).fill_(-torch.inf)

    def update(self, block: Block) -> None:
        put(self.lse, block.heads, block.absolute_rows(), block.lse)

    def merge(self, other: _LogSumExp) -> None:
        self.lse = torch.maximum(self.lse, other.lse)

    def absorb(self, other: _LogSumExp, places: Places) -> None:
        places.put(self.lse, other.lse)

    def result(self) -> RowValues:
        return RowValues(self.collector.name, self.extent.by_head(self.lse))


@dataclass(frozen=True)
class Entropy(Collector):
    """H_i = -sum_j p_ij log p_ij in nats, summed as p (log l - (s - m)): both parts are positive, nothing cancels."""

    @property
    def name(self) -> str:
        return "entropy"

    def start(self, extent: Extent) -> State[RowValues]:
        return _Entropy(self, extent, "entropy")


class _Entropy(_RowSums):
    def update(self, block: Block) -> None:
        self.add(block, "entropy", _entropy_of(block))

    def values(self) -> Tensor:
        # where the tiles of a row share a log-sum-exp made before, its rounding (6e-5 at scores of 1,000, in float32)
        # moves every log p by as much: an entropy of 0 may then come out below 0
        return super().values().clamp(min=0)


def _entropy_of(block: Block) -> Tensor:
    """(heads, rows): the block's share of -sum p log p."""
    spread = block.total * block.log_total - block.weighted_exponents
    return (spread * block.inverse).squeeze(-1) * LN2


@dataclass(frozen=True)
class EffectiveKeys(Collector):
    """e^(H_i): the number of keys over which even attention has the same entropy. With a sink the weights sum to less
    than 1, and the number is smaller."""

    @property
    def name(self) -> str:
        return "effective_keys"

    def start(self, extent: Extent) -> State[RowValues]:
        return _EffectiveKeys(self, extent, "entropy")


class _EffectiveKeys(_Entropy):
    def values(self) -> Tensor:
        return super().values().exp()


@dataclass(frozen=True)
class Distance(Collector):
    """sum_j p_ij |i - j|, in tokens; positions are bottom-right aligned where Nq != Nk, as under a causal mask."""

    @property
    def name(self) -> str:
        return "distance"

    def start(self, extent: Extent) -> State[RowValues]:
        return _Distance(self, extent, "first")


class _Distance(_RowSums):
    def update(self, block: Block) -> None:
        self.add(block, "first", _moments(block, 1)[0])


@dataclass(frozen=True)
class DistanceSpread(Collector):
    """Standard deviation of |i - j| under p_i, in tokens; p_i is divided by its sum where a sink keeps part of it."""

    @property
    def name(self) -> str:
        return "distance_spread"

    def start(self, extent: Extent) -> State[RowValues]:
        return _DistanceSpread(self, extent, "mass", "first", "second")


class _DistanceSpread(_RowSums):
    def __init__(self, collector: Collector, extent: Extent, *names: str) -> None:
        super().__init__(collector, extent, *names)
        # a difference of squares cancels, so both are summed in float64
        self.sums = {name: tensor.double() for name, tensor in self.sums.items()}

    def update(self, block: Block) -> None:
        mass = block.e.sum(-1, dtype=torch.float64) * block.inverse.squeeze(-1)
        for name, values in zip(("mass", "first", "second"), (mass, *_moments(block, 2)), strict=True):
            self.add(block, name, values)

    def values(self) -> Tensor:
        # weights rounded to float32 do not quite sum to 1, which the difference would show
        mass = self.of("mass").masked_fill(self.of("mass") == 0, 1.0)
        first, second = self.of("first") / mass, self.of("second") / mass
        return (second - first * first).clamp(min=0).sqrt().to(self.extent.dtype)


def _moments(block: Block, powers: int) -> list[Tensor]:
    """sum_j p_ij |i - j|^n for n = 1..powers: each (heads, rows).

    Left and right of the block's queries |i - j| is i's distance from the block's edge plus the edge's from j, so that
    a product with a vector for each power gives the sums for all queries at once; the square around the diagonal is
    done by itself.
    """
    rows, keys = block.rows, block.keys
    e, inverse = block.e, block.inverse.squeeze(-1)
    if powers == 2:
        e, inverse = e.double(), inverse.double()
    if not (isinstance(rows, slice) and isinstance(keys, slice)) or {rows.step, keys.step} - {None, 1}:
        d = block.distances().to(e.dtype)
        return [(e * d**n).sum(-1).mul_(inverse) for n in range(1, powers + 1)]
    q, k = block.query_positions, block.key_positions
    # from the ranges themselves: reading positions back would stall an accelerator
    start = rows.start + block.offset - keys.start
    low, high = (min(max(end, 0), len(k)) for end in (start, start + len(q)))
    out = [torch.zeros_like(inverse) for _ in range(powers)]
    for part, edge in ((slice(0, low), q[0]), (slice(high, None), q[-1])):
        far, near = (k[part] - edge).abs().to(e.dtype), (q - edge).abs().to(e.dtype)
        if not len(far):
            continue
        # one product with a vector after the other: with two or three columns at once it is several times slower
        sums = [e[..., part] @ far**n for n in range(powers + 1)]
        out[0] += sums[1] + near * sums[0]
        if powers == 2:
            out[1] += sums[2] + 2 * near * sums[1] + near * near * sums[0]
    if low < high:
        d = (q.unsqueeze(1) - k[low:high]).abs().to(e.dtype)
        for n in range(powers):
            out[n] += (e[..., low:high] * d ** (n + 1)).sum(-1)
    return [moment.mul_(inverse) for moment in out]


@dataclass(frozen=True)
class Mass(Collector):
    """Sum of p_ij over some keys: the first `first` of the sequence, those within `window` tokens of the query, or the
    union of `segments` ((start, stop), ...). Exactly one of the three; use several collectors for more."""

    first: int | None = None
    window: int | None = None
    segments: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.first, self.window, self.segments)) != 1:
            raise InputError(f"expected one of first, window and segments, got {self}")

    @property
    def name(self) -> str:
        if self.first is not None:
            return f"mass_first_{self.first}"
        if self.window is not None:
            return f"mass_window_{self.window}"
        return "mass_segments_" + "_".join(f"{a}_{b}" for a, b in self.segments or ())

    def start(self, extent: Extent) -> State[RowValues]:
        return _Mass(self, extent, "mass")


class _Mass(_RowSums):
    collector: Mass

    def update(self, block: Block) -> None:
        keys = block.key_positions
        if self.collector.window is not None:
            inside = block.distances() <= self.collector.window
        elif self.collector.first is not None:
            inside = (keys < self.collector.first).unsqueeze(-2)
        else:
            inside = torch.zeros_like(keys, dtype=torch.bool)
            for a, b in self.collector.segments or ():
                inside |= (keys >= a) & (keys < b)
            inside = inside.unsqueeze(-2)
        self.add(block, "mass", ((block.e * inside).sum(-1, keepdim=True) * block.inverse).squeeze(-1))


@dataclass(frozen=True)
class TopKeys(Collector):
    """The `count` keys with the largest p_ij, and the weights; the order among equal weights is not defined."""

    count: int = 8

    @property
    def name(self) -> str:
        return "top_keys"

    @property
    def largest(self) -> int:
        return self.count

    def start(self, extent: Extent) -> State[TopK]:
        return _TopKeys(self.name, self.count, extent)


@dataclass(frozen=True)
class Largest(Collector):
    """The largest weight of each query and its key: `TopKeys(1)` under a name of its own."""

    @property
    def largest(self) -> int:
        return 1

    @property
    def name(self) -> str:
        return "largest"

    def start(self, extent: Extent) -> State[TopK]:
        return _TopKeys(self.name, 1, extent)


class _TopKeys(State[TopK]):
    together: ClassVar[bool] = True

    def __init__(self, name: str, count: int, extent: Extent) -> None:
        if count < 1:
            raise InputError(f"expected a count of at least 1, got {count}")
        self.name, self.count, self.extent = name, count, extent
        # less than any weight, so that every key comes before an empty place
        self.weight = extent.zeros(extent.queries, count).fill_(-1.0)
        self.index = torch.full(self.weight.shape, -1, dtype=torch.int64, device=extent.device)

    def update(self, block: Block) -> None:
        exponents, places = block.largest(self.count)
        keys = expanded(block.absolute_keys(), len(exponents), exponents.device)
        index = keys.unsqueeze(1).expand(-1, exponents.shape[1], -1).gather(-1, places)
        weight = torch.exp2(exponents).mul_(block.inverse)
        if block.masked:
            absent = exponents <= -1e29
            weight.masked_fill_(absent, -1.0)
            index = index.masked_fill(absent, -1)
        rows = block.absolute_rows()
        short = self.count - weight.shape[-1]
        if block.whole and short > 0:
            weight = torch.nn.functional.pad(weight, (0, short), value=-1.0)
            index = torch.nn.functional.pad(index, (0, short), value=-1)
        if not block.whole:
            weight = torch.cat([take(self.weight, block.heads, rows), weight], -1)
            index = torch.cat([take(self.index, block.heads, rows), index], -1)
            weight, index = best_of(weight, index, self.count)
        put(self.weight, block.heads, rows, weight)
        put(self.index, block.heads, rows, index)

    def absorb(self, other: _TopKeys, places: Places) -> None:
        places.put(self.weight, other.weight)
        places.put_numbers(self.index, other.index)

    def merge(self, other: _TopKeys) -> None:
        weight, index = torch.cat([self.weight, other.weight], -1), torch.cat([self.index, other.index], -1)
        self.weight, self.index = best_of(weight, index, self.count)

    def result(self) -> TopK:
        weight = self.weight.clamp(min=0.0)
        return TopK(self.name, self.extent.by_head(self.index), self.extent.by_head(weight))
