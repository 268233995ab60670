"""Which tiles of the attention matrix to compute, and which pairs inside a tile may attend.

A `Tile` is a set of queries and the `Piece`s of keys that they meet, all computed densely; what a piece must not use is
said by `edges`. Tiles are made one at a time while the engine walks over them (`longlens.ops.exact.blockwise`), so no
mask is ever larger than a tile, and pairs outside every tile cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from longlens.ops.inputs import Inputs
from longlens.ops.masks import Rule

# a range (with step), numbers for all heads (m,), or numbers for each head (B, H, m)
Index: TypeAlias = slice | Tensor
Interval: TypeAlias = tuple[int, int]


# pairs in masks kept for the tiles to come
SHARED_PAIRS = 2**18


class Edge(NamedTuple):
    """Columns [start, stop) of a piece, and which of their pairs may attend: `keep`, broadcastable to (B, H, rows,
    columns)."""

    start: int
    stop: int
    keep: Tensor


class Piece(NamedTuple):
    """Keys that a tile's queries meet. Outside `edges` every pair attends."""

    keys: Index
    edges: tuple[Edge, ...]


class Tile(NamedTuple):
    """Queries `rows` and their keys. `once`: no other tile holds these queries, so the result needs no merging."""

    rows: Index
    pieces: tuple[Piece, ...]
    once: bool


@dataclass(frozen=True)
class TileShape:
    """Queries to a tile, most keys to a piece, and most scores held at a time (over heads)."""

    rows: int
    keys: int
    scores: int


def dense_shape(inputs: Inputs) -> TileShape:
    """Tiles for patterns in which a query meets most keys.

    Measured on 2 cores with AVX512-bf16: 512 rows fill the matrix unit, and scores of 1-4 MiB stay in cache. In half
    precision whole rows in one piece, which need no online softmax, are faster by 1.5 to 3.5 at every length measured
    (2,048 to 131,072 keys), with 128 rows from 16,384 keys on.
    """
    if inputs.device_type == "cuda":
        return TileShape(1024, 8192, 2**26)
    if inputs.query.element_size() == 2:
        return TileShape(512 if inputs.keys <= 2**13 else 128, 2**18, 2**21)
    return TileShape(256, 2**11, 2**20)


def sparse_shape(inputs: Inputs) -> TileShape:
    """Tiles for patterns in which a query meets few keys: fewer rows waste fewer pairs at the pattern's edge."""
    if inputs.device_type == "cuda":
        return TileShape(256, 8192, 2**26)
    if inputs.query.element_size() == 2:
        return TileShape(128, 2**14, 2**20)
    return TileShape(64, 2**12, 2**20)


def tile_elements(inputs: Inputs, shape: TileShape, keys: int) -> int:
    """Elements held for the largest tile of `shape` whose queries meet `keys` keys: scores, and what is made of
    them."""
    kv_heads = inputs.query.shape[0] * inputs.key.shape[1]
    per_head = inputs.groups * min(shape.rows, inputs.queries) * min(keys, shape.keys)
    step = max(1, min(kv_heads, shape.scores // max(1, per_head)))
    copies = 1 + (inputs.bias is not None) + 2 * (inputs.dropout > 0)
    return copies * step * per_head


def positions(index: Index, offset: int, device: torch.device) -> Tensor:
    """The positions that an index means, (m,) or (B, H, m)."""
    if isinstance(index, slice):
        return torch.arange(index.start + offset, index.stop + offset, index.step or 1, device=device)
    return index + offset


def size(index: Index) -> int:
    """How many rows or keys an index means."""
    if isinstance(index, slice):
        return len(range(index.start, index.stop, index.step or 1))
    return index.shape[-1]


@dataclass
class Keeper:
    """Says which pairs of a piece may attend: those that all `rules` allow, none of `earlier` allows, and `key_mask`
    keeps.

    `earlier` holds the parts of a union that other tiles have covered, so that no pair counts twice.
    """

    inputs: Inputs
    rules: Sequence[Rule] = ()
    earlier: Sequence[Rule] = ()
    _shared: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def edges(self, rows: Index, keys: Index, *, given: bool = False) -> tuple[Edge, ...]:
        """The edges of a piece. `given`: the rules are known to allow every pair, only the key mask is asked."""
        count = size(keys)
        if (given or not self.rules) and not self.earlier:
            keep = self._key_mask(keys)
            return () if keep is None else (Edge(0, count, keep),)
        clear = self._clear(rows, keys)
        spans = [(0, count)] if clear is None else [(0, clear[0]), (clear[1], count)]
        return tuple(Edge(a, b, self._keep(rows, _part(keys, a, b))) for a, b in spans if a < b)

    def _clear(self, rows: Index, keys: Index) -> Interval | None:
        """Columns of the piece in which every pair attends, where they are one range worth splitting off."""
        if self.earlier or not isinstance(rows, slice) or not isinstance(keys, slice):
            return None
        if (rows.step or 1) != 1 or (keys.step or 1) != 1 or self._key_mask(keys) is not None:
            return None
        lo, hi = rows.start + self.inputs.offset, rows.stop + self.inputs.offset
        clears = [rule.clear(lo, hi, self.inputs.keys) for rule in self.rules]
        a = max(keys.start, *(a for a, _ in clears)) - keys.start
        b = min(keys.stop, *(b for _, b in clears)) - keys.start
        return (a, b) if a < b else None

    def _keep(self, rows: Index, keys: Index) -> Tensor:
        shareable = (
            self.inputs.key_mask is None
            and isinstance(rows, slice)
            and isinstance(keys, slice)
            and all(rule.shift_invariant for rule in (*self.rules, *self.earlier))
        )
        if not shareable:
            return self._evaluate(rows, keys)
        assert isinstance(rows, slice)
        assert isinstance(keys, slice)
        shape = (keys.start - rows.start, size(rows), size(keys), rows.step or 1, keys.step or 1)
        if shape not in self._shared:
            # tiles far apart in a long row share nothing, and their masks must not pile up
            if sum(mask.numel() for mask in self._shared.values()) > SHARED_PAIRS:
                self._shared.clear()
            self._shared[shape] = self._evaluate(rows, keys)
        return self._shared[shape]

    def _evaluate(self, rows: Index, keys: Index) -> Tensor:
        device, n = self.inputs.key.device, self.inputs.keys
        q = positions(rows, self.inputs.offset, device).unsqueeze(-1)
        k = positions(keys, 0, device).unsqueeze(-2)
        keep = torch.ones((), dtype=torch.bool, device=device)
        for rule in self.rules:
            keep = keep & rule.allowed(q, k, n)
        for rule in self.earlier:
            keep = keep & ~rule.allowed(q, k, n)
        masked = self._key_mask(keys)
        keep = keep if masked is None else keep & masked
        return keep.expand(*(1,) * (2 - keep.ndim), *keep.shape) if keep.ndim < 2 else keep

    def _key_mask(self, keys: Index) -> Tensor | None:
        """(B, H|1, 1, keys) or None where every key is kept."""
        mask = self.inputs.key_mask
        if mask is None:
            return None
        if isinstance(keys, Tensor) and keys.ndim == 3:
            part = mask.unsqueeze(1).expand(-1, keys.shape[1], -1).gather(2, keys).unsqueeze(2)
        else:
            part = mask[:, keys][:, None, None, :]
        # reading the answer back would stall an accelerator, and there an extra mask costs little
        return None if part.device.type == "cpu" and bool(part.all()) else part


def _part(keys: Index, a: int, b: int) -> Index:
    if isinstance(keys, slice):
        step = keys.step or 1
        return slice(keys.start + a * step, min(keys.stop, keys.start + b * step), keys.step)
    return keys[..., a:b]


def merge_intervals(intervals: Sequence[Interval], bounds: Interval) -> list[Interval]:
    """Sorted, disjoint and within `bounds`."""
    low, high = bounds
    merged: list[Interval] = []
    for a, b in sorted(intervals):
        a, b = max(a, low), min(b, high)
        if a >= b:
            continue
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def split_keys(intervals: Sequence[Interval], most: int, device: torch.device) -> list[Index]:
    """Intervals as indices of at most `most` keys each: ranges where they are long, numbers where they are
    scattered."""
    if len(intervals) == 1:
        (a, b), = intervals  # fmt: skip
        return [slice(start, min(start + most, b)) for start in range(a, b, most)]
    if not intervals:
        return []
    numbers = torch.cat([torch.arange(a, b, device=device) for a, b in intervals])
    return list(numbers.split(most))


def dense_tiles(inputs: Inputs, shape: TileShape | None = None) -> Iterator[Tile]:
    """Tiles over all pairs that the masks leave: rows in blocks, keys within the rule's span."""
    shape = shape or dense_shape(inputs)
    rule = inputs.mask_rule()
    keeper = Keeper(inputs, () if rule is None else (rule,))
    device, n = inputs.key.device, inputs.keys
    for start in range(0, inputs.queries, shape.rows):
        rows = slice(start, min(start + shape.rows, inputs.queries))
        span = (0, n) if rule is None else rule.span(rows.start + inputs.offset, rows.stop + inputs.offset, n)
        pieces = tuple(
            Piece(keys, keeper.edges(rows, keys))
            for keys in split_keys(merge_intervals([span], (0, n)), shape.keys, device)
        )
        yield Tile(rows, pieces, once=True)
