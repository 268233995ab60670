"""Random blocks: every block of queries meets a few blocks of keys drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from longlens.ops.method import LARGEST_SEED, check_count
from longlens.ops.sparse.pattern import Pattern
from longlens.ops.sparse.strata import Intervals, Stratum, block_intervals
from longlens.ops.tiles.grid import Interval


@final
@dataclass(frozen=True)
class Random(Pattern, Intervals):
    """Random attention by blocks (BigBird, Zaheer et al. 2020, section 2 and appendix D).

    Each block of `block` queries meets `blocks` key blocks drawn without replacement from all of the sequence's, or,
    with `past`, from those up to its own; under `is_causal` that form is used, so that the draw knows nothing of the
    length. The draw depends on `seed`, the query block and the number of blocks alone. Time N blocks block, memory N.
    """

    blocks: int = 3
    block: int = 64
    seed: int = 0
    past: bool = False
    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        check_count("random", "blocks", self.blocks, 0)
        check_count("random", "block", self.block)
        check_count("random", "seed", self.seed, 0, LARGEST_SEED)

    @property
    def shift_invariant(self) -> bool:
        return False

    def causal_form(self) -> Pattern:
        """Blocks drawn from the past."""
        return replace(self, past=True)

    def strata(self) -> tuple[Stratum, ...]:
        """One: itself."""
        return (self,)

    def drawn(self, query_block: int, n: int) -> tuple[int, ...]:
        """The key blocks of a query block, for `n` keys."""
        return draw_blocks(self.seed, query_block, self.blocks, -(-n // self.block), self.past)

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        numbers, place = torch.unique(q // self.block, return_inverse=True)
        table = [self.drawn(number, n) for number in numbers.tolist()]
        width = max((len(row) for row in table), default=0)
        padded = torch.tensor([[*row, *[-1] * (width - len(row))] for row in table], device=k.device, dtype=k.dtype)
        if width == 0:
            return torch.zeros(1, 1, dtype=torch.bool, device=k.device)
        return (padded[place.squeeze(-1)].unsqueeze(-2) == (k // self.block).unsqueeze(-1)).any(-1)

    def intervals(self, lo: int, hi: int, n: int) -> list[Interval]:
        """The blocks drawn for each query block in the range."""
        return block_intervals(lo, hi, self.block, lambda number: self.drawn(number, n))

    def covers(self, lo: int, hi: int) -> bool:
        """Rows of one block share their keys."""
        return lo // self.block == (hi - 1) // self.block


@lru_cache(1 << 16)
def draw_blocks(seed: int, query_block: int, count: int, blocks: int, past: bool) -> tuple[int, ...]:
    """`count` of the key blocks 0..blocks - 1, or, with `past`, of those up to the query block; without replacement."""
    clamped = min(max(query_block, 0), max(blocks - 1, 0))
    choices = clamped + 1 if past else blocks
    generator = np.random.default_rng((seed, clamped))
    return tuple(sorted(generator.choice(choices, min(count, choices), replace=False).tolist()))
