"""What a sparse method is: a pattern of pairs, and how it is cut into tiles.

A pattern is a mask rule (which pairs attend) that also knows where its pairs lie, so that nothing else is computed. Its
pairs lie in strata of two kinds:

    Intervals   for a block of neighbouring queries, a few ranges of keys (windows, global columns, blocks)
    Lane        keys a multiple of `step` away: queries and keys of one residue class meet (dilation, strides)

All interval strata of a union become one set of tiles; a lane's tiles leave out the pairs of the strata before it,
and the parts of a row are merged by their log-sum-exp. So every pair counts once, and the softmax is exact over the
union.

Padding: where a pattern depends on absolute positions, positions count from the first kept key of each batch row to the
last, so that padding on either side changes nothing.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longlens.ops.exact.blockwise import Walk, attend_tiles
from longlens.ops.inputs import Inputs
from longlens.ops.masks import Rule
from longlens.ops.method import Attended, Method, Tiled
from longlens.ops.reference import softmax_attention
from longlens.ops.tiles import (
    Interval,
    Keeper,
    Piece,
    Tile,
    TileShape,
    merge_intervals,
    sparse_shape,
    split_keys,
    tile_elements,
)

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
    def block(self) -> int | None:
        """Rows that share their keys, aligned to `anchor`; None where every row has its own."""
        return None

    @property
    def anchor(self) -> int:
        return 0


@dataclass(frozen=True)
class Lane(Rule):
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


class Pattern(Rule, Method):
    """A sparse method: exact softmax over the pairs of a pattern. Subclasses are final frozen dataclasses."""

    @abstractmethod
    def strata(self) -> tuple[Intervals | Lane, ...]:
        """Where the pattern's pairs lie."""

    def causal_form(self) -> Pattern:
        """The pattern to use under a causal mask, where that differs."""
        return self

    @property
    def shift_invariant(self) -> bool:
        return all(stratum.shift_invariant for stratum in self.strata())

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        return any_allowed(self.strata(), q, k, n)

    def localise(self, inputs: Inputs) -> list[tuple[Method, Inputs]]:
        """The pattern in its causal form; under a key mask, each batch row with positions of its own."""
        form = self.causal_form() if inputs.causal else self
        if inputs.key_mask is None or form.shift_invariant:
            return [(form, inputs)]
        rows: list[tuple[Method, Inputs]] = []
        for part, keep in zip(inputs.rows(), inputs.key_mask, strict=True):
            kept = keep.nonzero()
            first, length = (int(kept[0]), int(kept[-1] - kept[0]) + 1) if len(kept) else (0, 0)
            whole = first == 0 and length == inputs.keys
            rows.append((form if whole else Shifted(form, first, length), part))
        return rows

    def attend(self, inputs: Inputs) -> Attended:
        """Exact softmax over the pattern's pairs."""
        return attend_strata(self.strata(), inputs)

    def tiles(self, inputs: Inputs, shape: TileShape) -> Tiled:
        """The pattern's pairs."""
        return Tiled(inputs, strata_tiles(self.strata(), inputs, shape))

    def peak_elements(self, inputs: Inputs) -> int:
        """Scores of one tile, in the middle of the sequence or with global queries."""
        shape, n = sparse_shape(inputs), inputs.keys
        keys = 0
        for stratum in self.strata():
            if isinstance(stratum, Lane):
                keys = max(keys, n // stratum.step)
                continue
            lo = n // 2
            ranges = merge_intervals(stratum.intervals(lo, min(n, lo + shape.rows), n), (0, n))
            keys += sum(b - a for a, b in ranges)
        return tile_elements(inputs, shape, keys)

    def reference(self, inputs: Inputs) -> Tensor:
        """Softmax over the pattern's pairs by definition."""
        parts = [softmax_attention(part, form)[0] for form, part in self.localise(inputs) if isinstance(form, Rule)]
        return torch.cat(parts)

    def __or__(self, other: Method) -> Method:
        from longlens.ops.sparse.union import unite

        return unite((self, other)) if isinstance(other, Method) else NotImplemented


def any_allowed(rules: Sequence[Rule], q: Tensor, k: Tensor, n: int) -> Tensor:
    """Pairs that at least one rule allows."""
    keep = rules[0].allowed(q, k, n)
    for rule in rules[1:]:
        keep = keep | rule.allowed(q, k, n)
    return keep


@dataclass(frozen=True)
class Shifted(Pattern):
    """A pattern on keys first..first + length, whose positions count from `first`."""

    pattern: Pattern
    first: int
    length: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """The pattern's own."""
        return self.pattern.name

    def strata(self) -> tuple[Intervals | Lane, ...]:
        """The pattern's strata, shifted where they depend on positions."""
        if self.length == 0:
            return ()
        return tuple(
            stratum if isinstance(stratum, Lane) or stratum.shift_invariant
            else _ShiftedIntervals(stratum, self.first, self.length)
            for stratum in self.pattern.strata()
        )  # fmt: skip

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        if self.length == 0:
            return torch.zeros(1, 1, dtype=torch.bool, device=k.device)
        return super().allowed(q, k, n)


@dataclass(frozen=True)
class _ShiftedIntervals(Intervals):
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


def attend_strata(strata: Sequence[Intervals | Lane], inputs: Inputs) -> Attended:
    """Exact softmax over the union of strata."""
    from longlens.ops.sparse.banded import head_start

    shape = sparse_shape(inputs)
    start = head_start(strata, inputs)
    return attend_tiles(
        Walk(inputs, lambda shapes, done: strata_tiles(strata, shapes, shape, done), shape.scores, head_start=start)
    )


def strata_tiles(
    strata: Sequence[Intervals | Lane], inputs: Inputs, shape: TileShape, done: Interval = (0, 0)
) -> Iterator[Tile]:
    """The tiles of a union of strata; none for interval strata within the rows `done`."""
    near = [stratum for stratum in strata if isinstance(stratum, Intervals)]
    lanes = [stratum for stratum in strata if isinstance(stratum, Lane)]
    once = len(lanes) + bool(near) <= 1
    if not strata:
        # a batch row without keys: every query still gets its zeros
        yield Tile(slice(0, inputs.queries), (), once)
    if near:
        yield from _interval_tiles(near, inputs, shape, once, done)
    for place, lane in enumerate(lanes):
        yield from _lane_tiles(lane, (*near, *lanes[:place]), inputs, shape, once)


def _interval_tiles(
    strata: list[Intervals], inputs: Inputs, shape: TileShape, once: bool, done: Interval
) -> Iterator[Tile]:
    n, device, offset = inputs.keys, inputs.key.device, inputs.offset
    mask = inputs.mask_rule()
    masks = () if mask is None else (mask,)
    masked = Keeper(inputs, masks)
    both = Keeper(inputs, (strata[0] if len(strata) == 1 else _AnyOf(tuple(strata)), *masks))
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
        keeper = masked if all(stratum.covers(lo, hi) for stratum in strata) else both
        yield Tile(rows, tuple(Piece(k, keeper.edges(rows, k)) for k in split_keys(ranges, shape.keys, device)), once)
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


def _lane_tiles(lane: Lane, earlier: tuple[Rule, ...], inputs: Inputs, shape: TileShape, once: bool) -> Iterator[Tile]:
    n, offset, step = inputs.keys, inputs.offset, lane.step
    mask = inputs.mask_rule()
    rules = () if mask is None else (mask,)
    bounded = lane.left < FAR or lane.right < FAR
    keeper = Keeper(inputs, (lane, *rules) if bounded else rules, earlier)
    for residue in sorted({(row + offset) % step for row in range(min(step, inputs.queries))}):
        first = (residue - offset) % step
        count = len(range(first, inputs.queries, step))
        # in units of the lane: row r stands at `base + r`, key c at c
        base, keys = (first + offset - residue) // step, len(range(residue, n, step))
        for start in range(0, count, shape.rows):
            stop = min(start + shape.rows, count)
            rows = slice(first + start * step, first + (stop - 1) * step + 1, step)
            lo, hi = base + start, base + stop
            bounds = (0, n)
            if mask is not None:
                bounds = mask.span(rows.start + offset, rows.stop + offset, n)
            low = max(0, lo - lane.left, -(-(bounds[0] - residue) // step))
            high = min(keys, hi + lane.right, -(-(bounds[1] - residue) // step))
            pieces = []
            for a in range(low, high, shape.keys):
                b = min(a + shape.keys, high)
                span = slice(residue + a * step, residue + (b - 1) * step + 1, step)
                pieces.append(Piece(span, keeper.edges(rows, span)))
            yield Tile(rows, tuple(pieces), once)
