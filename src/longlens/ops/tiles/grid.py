"""What a tile of the attention matrix is, how large tiles are, and ranges of keys.

A `Tile` is a set of queries and the `Piece`s of keys that they meet, all computed densely; the pairs of a piece that
may not attend are named by its `edges`. Tiles are made one at a time while the engine goes over them, so no mask is
ever larger than a tile, and pairs outside every tile cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from longlens.ops.inputs import Inputs
from longlens.ops.tiles.index import Index

Interval: TypeAlias = tuple[int, int]


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
    """Queries to a tile, most keys to a piece, and most scores computed at a time (over heads)."""

    rows: int
    keys: int
    scores: int


def dense_shape(inputs: Inputs) -> TileShape:
    """Tiles for patterns in which a query meets most keys.

    Measured on 2 cores with AVX-512: scores of 1 to 4 MiB stay in cache. Keys come in pieces of one length, since the
    matrix products of half precision keep a plan for every length that they meet: under a causal mask, whole rows
    would make one for each block of rows, 645 MiB at 65,536 tokens.
    """
    if inputs.device_type == "cuda":
        return TileShape(1024, 8192, 2**26)
    return TileShape(256, 2**11, 2**20)


def sparse_shape(inputs: Inputs) -> TileShape:
    """Tiles for patterns in which a query meets few keys: fewer rows waste fewer pairs at the pattern's edge."""
    if inputs.device_type == "cuda":
        return TileShape(256, 8192, 2**26)
    if inputs.query.element_size() == 2:
        return TileShape(128, 2**14, 2**19)
    return TileShape(64, 2**12, 2**20)


def tile_elements(inputs: Inputs, shape: TileShape, keys: int) -> int:
    """Elements of scratch for the largest tile of `shape` whose queries meet `keys` keys: scores, and what is made of
    them."""
    kv_heads = inputs.query.shape[0] * inputs.key.shape[1]
    per_head = inputs.groups * min(shape.rows, inputs.queries) * min(keys, shape.keys)
    learned = inputs.bias is not None and any(parameter.requires_grad for parameter in inputs.bias.parameters())
    # the gradient of a learned bias is summed over all heads of a tile at once (`TiledProblem.scores_at_once`)
    step = kv_heads if learned else max(1, min(kv_heads, shape.scores // max(1, per_head)))
    copies = 1 + (inputs.bias is not None) + (inputs.softcap is not None) + 2 * (inputs.dropout > 0)
    if inputs.query.element_size() == 2:
        # scores and all that is made of them are float32, the weights are rounded for their product
        copies = 2 * copies + 1
    return copies * step * per_head


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
