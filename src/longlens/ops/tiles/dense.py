"""The tiles of attention in which a query meets most keys."""

from __future__ import annotations

from collections.abc import Iterator

from longlens.ops.inputs import Inputs
from longlens.ops.tiles.grid import Piece, Tile, TileShape, dense_shape, merge_intervals, split_keys
from longlens.ops.tiles.mask import TileMask


def dense_tiles(inputs: Inputs, shape: TileShape | None = None) -> Iterator[Tile]:
    """Tiles over all pairs that the masks leave: rows in blocks, keys within the rule's span."""
    shape = shape or dense_shape(inputs)
    rule = inputs.mask_rule()
    mask = TileMask(inputs, () if rule is None else (rule,))
    device, n = inputs.key.device, inputs.keys
    for start in range(0, inputs.queries, shape.rows):
        rows = slice(start, min(start + shape.rows, inputs.queries))
        span = (0, n) if rule is None else rule.span(rows.start + inputs.offset, rows.stop + inputs.offset, n)
        pieces = tuple(
            Piece(keys, mask.edges(rows, keys))
            for keys in split_keys(merge_intervals([span], (0, n)), shape.keys, device)
        )
        yield Tile(rows, pieces, once=True)
