"""Block-sparse: any layout of blocks, given by hand."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor

from longlens.errors import MaskError, MethodError
from longlens.ops.inputs import Inputs
from longlens.ops.method import check_count
from longlens.ops.sparse.pattern import Pattern
from longlens.ops.sparse.strata import Intervals, Stratum, block_intervals
from longlens.ops.tiles.grid import Interval


@final
@dataclass(frozen=True)
class BlockSparse(Pattern, Intervals):
    """Attention over blocks of a layout: query block b meets the key blocks `layout[b]` (Gray et al. 2017).

    `layout` holds, for each block of `block` queries, the numbers of its key blocks; a bool array (query blocks, key
    blocks) is taken too. It must reach over every query position. Time: the blocks' pairs; memory N.
    """

    layout: tuple[tuple[int, ...], ...]
    block: int = 64
    name: ClassVar[str] = "blocksparse"

    def __post_init__(self) -> None:
        check_count("blocksparse", "block", self.block)
        object.__setattr__(self, "layout", _as_numbers(self.layout))

    @property
    def shift_invariant(self) -> bool:
        return False

    def strata(self) -> tuple[Stratum, ...]:
        """One: itself."""
        return (self,)

    def refusals(self, inputs: Inputs) -> list[str]:
        """A layout that is too short."""
        bounds = inputs.cu_seqlens
        longest = max(b - a for a, b in pairwise(bounds)) if bounds else inputs.keys
        reach = len(self.layout) * self.block
        if longest > reach:
            return [
                f"its layout has {len(self.layout)} blocks of {self.block} queries, which reach {reach} of {longest}"
            ]
        return []

    def _keys_of(self, query_block: int) -> tuple[int, ...]:
        return self.layout[min(max(query_block, 0), len(self.layout) - 1)] if self.layout else ()

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        numbers, place = torch.unique(q // self.block, return_inverse=True)
        if len(numbers) and int(numbers[-1]) >= len(self.layout):
            raise MaskError(
                f"blocksparse: expected a layout that reaches every query, got {len(self.layout)} blocks of "
                f"{self.block} for a query at {int(q.max())}; give more blocks"
            )
        blocks = -(-max(n, 1) // self.block)
        table = torch.zeros(len(numbers), blocks, dtype=torch.bool)
        for row, number in enumerate(numbers.tolist()):
            table[row, [key for key in self._keys_of(number) if key < blocks]] = True
        rows = table.to(k.device)[place.squeeze(-1)]
        columns = k // self.block
        if columns.ndim == 2:
            return rows[..., columns.squeeze(0)]
        return rows.gather(-1, columns.expand(*rows.shape[:-1], -1))

    def intervals(self, lo: int, hi: int, n: int) -> list[Interval]:
        """The key blocks of each query block in the range."""
        return block_intervals(lo, hi, self.block, self._keys_of)

    def covers(self, lo: int, hi: int) -> bool:
        """Rows of one block share their keys."""
        return lo // self.block == (hi - 1) // self.block


def _as_numbers(layout: Any) -> tuple[tuple[int, ...], ...]:
    """A layout as block numbers, from block numbers or from a bool array."""
    if hasattr(layout, "ndim"):
        grid = np.asarray(layout)
        if grid.ndim != 2 or grid.dtype != bool:
            raise MethodError(
                f"blocksparse: expected a bool layout (query blocks, key blocks), got {grid.dtype} {grid.shape}"
            )
        return tuple(tuple(np.flatnonzero(row).tolist()) for row in grid)
    try:
        rows = tuple(tuple(sorted(set(row))) for row in layout)
    except TypeError:
        rows = ((-1,),)
    if any(not isinstance(key, int) or isinstance(key, bool) or key < 0 for row in rows for key in row):
        raise MethodError(
            f"blocksparse: expected layout to hold, for each query block, key block numbers, got {layout!r}"
        )
    return rows
