"""Where the pairs of a sparse pattern lie, and how they are cut into tiles.

A pattern's pairs lie in strata of two kinds:

    Intervals     for a block of neighbouring queries, a few ranges of keys (windows, global columns, blocks)
    StridedKeys   keys a multiple of `step` away: queries and keys of one residue class meet (dilation, strides)

All interval strata of a union become one set of tiles; the tiles of strided keys leave out the pairs of the strata
before them, and the parts of a row are merged by their log-sum-exp. So every pair counts once, and the softmax is exact
over the union.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from longlens.ops.inputs import Inputs
from longlens.ops.masks import Rule
from longlens.ops.tiles.grid import Interval, Piece, Tile, TileShape, merge_intervals, split_keys
from longlens.ops.tiles.mask import TileMask

FAR = sys.maxsize


class Intervals(Rule):
    """A stratum whose pairs, for neighbouring queries, lie in ranges of keys."""

    @abstractmethod
    def intervals(self, lo: int, hi: int, n: int) -> list[Interval]:
        """Ranges of keys that hold every pair of query positions [lo, hi), for `n` keys."""

    def everywhere(self, n: int) -> Sequence[int]:
        """Query positions that attend to every key."""
        return ()

    def covers(self, lo: int, hi: int) -> bool:
        """True where all pairs of [lo, hi) with `intervals(lo, hi)` attend, `everywhere` apart: no mask is needed."""
        return False

    @property
    def band(self) -> tuple[int, int] | None:
        """(left, right) where the pairs are exactly those with -left <= key - query <= right; None otherwise."""
        return None

    @property
    def block(self) -> int | None:
        """Rows that share their keys, aligned to `anchor`; None where every row has its own."""
        return None

    @property
    def anchor(self) -> int:
        return 0


@dataclass(frozen=True)
class StridedKeys(Rule):
    """Keys at distances d = key - query that `step` divides, with -left <= d / step <= right."""

    step: int
    left: int = FAR
    right: int = FAR

    @property
    def shift_invariant(self) -> bool:
        return True

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        distance = k - q
        keep = distance % self.step == 0
        if self.left < FAR:
            keep = keep & (distance >= -self.left * self.step)
        if self.right < FAR:
            keep = keep & (distance <= self.right * self.step)
        return keep


Stratum: TypeAlias = Intervals | StridedKeys


def any_allowed(rules: Sequence[Rule], q: Tensor, k: Tensor, n: int) -> Tensor:
    """Pairs that at least one rule allows."""
    keep = rules[0].allowed(q, k, n)
    for rule in rules[1:]:
        keep = keep | rule.allowed(q, k, n)
    return keep


@dataclass(frozen=True)
class ShiftedIntervals(Intervals):
    """`inner` on keys first..first + length, whose positions count from `first`."""

    inner: Intervals
    first: int
    length: int

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        inside = (k >= self.first) & (k < self.first + self.length)
        # keys outside are clamped only to be asked about: `inside` leaves them out
        return self.inner.allowed(q - self.first, (k - self.first).clamp(0, self.length - 1), self.length) & inside

    def intervals(self, lo: int, hi: int, n: int) -> list[Interval]:
        inner = self.inner.intervals(lo - self.first, hi - self.first, self.length)
        return [(a + self.first, b + self.first) for a, b in merge_intervals(inner, (0, self.length))]

    def everywhere(self, n: int) -> Sequence[int]:
        return [position + self.first for position in self.inner.everywhere(self.length)]

    def covers(self, lo: int, hi: int) -> bool:
        return self.inner.covers(lo - self.first, hi - self.first)

    @property
    def block(self) -> int | None:
        return self.inner.block

    @property
    def anchor(self) -> int:
        return self.inner.anchor + self.first


@dataclass(frozen=True)
class _AnyOf(Rule):
    rules: tuple[Rule, ...]

    @property
    def shift_invariant(self) -> bool:
        return all(rule.shift_invariant for rule in self.rules)

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        return any_allowed(self.rules, q, k, n)

    def clear(self, lo: int, hi: int, n: int) -> tuple[int, int]:
        return max((rule.clear(lo, hi, n) for rule in self.rules), key=lambda span: span[1] - span[0])


def block_intervals(lo: int, hi: int, block: int, key_blocks: Callable[[int], Iterable[int]]) -> list[Interval]:
    """The keys of queries lo..hi where query block b meets the key blocks `key_blocks(b)`, all of length `block`."""
    met = {key for number in range(lo // block, (hi - 1) // block + 1) for key in key_blocks(number)}
    return [(key * block, (key + 1) * block) for key in sorted(met)]


def strata_tiles(
    strata: Sequence[Stratum], inputs: Inputs, shape: TileShape, done: Interval = (0, 0)
) -> Iterator[Tile]:
    """The tiles of a union of strata; none for interval strata within the rows `done`."""
    near = [stratum for stratum in strata if isinstance(stratum, Intervals)]
    strided = [stratum for stratum in strata if isinstance(stratum, StridedKeys)]
    once = len(strided) + bool(near) <= 1
    if not strata:
        # a batch row without keys: every query still gets its zeros
        yield Tile(slice(0, inputs.queries), (), once)
    if near:
        yield from _interval_tiles(near, inputs, shape, once, done)
    for place, keys in enumerate(strided):
        yield from _strided_tiles(keys, (*near, *strided[:place]), inputs, shape, once)


def _interval_tiles(
    strata: list[Intervals], inputs: Inputs, shape: TileShape, once: bool, done: Interval
) -> Iterator[Tile]:
    n, device, offset = inputs.keys, inputs.key.device, inputs.offset
    mask = inputs.mask_rule()
    masks = () if mask is None else (mask,)
    masked = TileMask(inputs, masks)
    both = TileMask(inputs, (strata[0] if len(strata) == 1 else _AnyOf(tuple(strata)), *masks))
    full = {position - offset for stratum in strata for position in stratum.everywhere(n)}
    full = {row for row in full if 0 <= row < inputs.queries}
    for start, stop in _row_blocks(strata, inputs, shape):
        if done[0] <= start and stop <= done[1]:
            continue
        rows: slice | Tensor = slice(start, stop)
        if full and not full.isdisjoint(range(start, stop)):
            left = [row for row in range(start, stop) if row not in full]
            if not left:
                continue
            rows = torch.tensor(left, device=device)
        lo, hi = start + offset, stop + offset
        bounds = (0, n) if mask is None else mask.span(lo, hi, n)
        ranges = merge_intervals([i for stratum in strata for i in stratum.intervals(lo, hi, n)], bounds)
        pair_mask = masked if all(stratum.covers(lo, hi) for stratum in strata) else both
        yield Tile(
            rows, tuple(Piece(k, pair_mask.edges(rows, k)) for k in split_keys(ranges, shape.keys, device)), once
        )
    everywhere = torch.tensor(sorted(full), device=device, dtype=torch.int64)
    for rows in everywhere.split(shape.rows) if len(everywhere) else ():
        keys = split_keys([(0, n)], shape.keys, device)
        yield Tile(rows, tuple(Piece(k, masked.edges(rows, k)) for k in keys), once)


def _row_blocks(strata: list[Intervals], inputs: Inputs, shape: TileShape) -> Iterator[Interval]:
    """Ranges of query rows that share a tile, aligned to the pattern's blocks."""
    blocks = [stratum.block for stratum in strata if stratum.block]
    rows = shape.rows
    if blocks:
        # a small block shares its tile with its neighbours, a large one is cut
        block = min(blocks)
        rows = block * max(1, shape.rows // block) if block <= shape.rows // 2 else block
        while rows > 2 * shape.rows and rows % 2 == 0:
            rows //= 2
    start = shift = 0
    if blocks:
        shift = (inputs.offset - next(stratum.anchor for stratum in strata if stratum.block)) % rows
    while start < inputs.queries:
        stop = min(inputs.queries, start + rows - (start + shift) % rows)
        yield start, stop
        start = stop


def _strided_tiles(
    strided: StridedKeys, earlier: tuple[Rule, ...], inputs: Inputs, shape: TileShape, once: bool
) -> Iterator[Tile]:
    n, offset, step = inputs.keys, inputs.offset, strided.step
    rule = inputs.mask_rule()
    rules = () if rule is None else (rule,)
    bounded = strided.left < FAR or strided.right < FAR
    mask = TileMask(inputs, (strided, *rules) if bounded else rules, earlier)
    for residue in sorted({(row + offset) % step for row in range(min(step, inputs.queries))}):
        first = (residue - offset) % step
        count = len(range(first, inputs.queries, step))
        # in units of `step`: row r stands at `base + r`, key c at c
        base, keys = (first + offset - residue) // step, len(range(residue, n, step))
        for start in range(0, count, shape.rows):
            stop = min(start + shape.rows, count)
            rows = slice(first + start * step, first + (stop - 1) * step + 1, step)
            lo, hi = base + start, base + stop
            bounds = (0, n)
            if rule is not None:
                bounds = rule.span(rows.start + offset, rows.stop + offset, n)
            low = max(0, lo - strided.left, -(-(bounds[0] - residue) // step))
            high = min(keys, hi + strided.right, -(-(bounds[1] - residue) // step))
            pieces = []
            for a in range(low, high, shape.keys):
                b = min(a + shape.keys, high)
                span = slice(residue + a * step, residue + (b - 1) * step + 1, step)
                pieces.append(Piece(span, mask.edges(rows, span)))
            yield Tile(rows, tuple(pieces), once)
