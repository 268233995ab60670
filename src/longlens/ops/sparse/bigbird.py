"""BigBird: neighbouring blocks, random blocks and global blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from longlens.ops.method import check_count
from longlens.ops.sparse.pattern import Pattern
from longlens.ops.sparse.random_blocks import Random
from longlens.ops.sparse.strata import Intervals, Stratum
from longlens.ops.tiles.grid import Interval


@final
@dataclass(frozen=True)
class BigBird(Pattern, Intervals):
    """BigBird's pattern by blocks (Zaheer et al. 2020, arXiv:2007.14062, section 2, internal transformer construction).

    A query meets its own block of `block` and the two beside it, `random` blocks drawn at random (`Random`; a draw may
    coincide with the others, and counts once), and the first `global_blocks` blocks, whose queries meet every key. Time
    N block (3 + random + global_blocks), memory N. Unlike common implementations it does not turn into full attention
    on short inputs, other than by its blocks covering them.
    """

    block: int = 64
    random: int = 3
    global_blocks: int = 1
    seed: int = 0
    past: bool = False
    name: ClassVar[str] = "bigbird"

    def __post_init__(self) -> None:
        check_count("bigbird", "global_blocks", self.global_blocks, 0)
        self._random()

    def _random(self) -> Random:
        return Random(self.random, self.block, self.seed, self.past)

    @property
    def shift_invariant(self) -> bool:
        return False

    def causal_form(self) -> Pattern:
        """Random blocks drawn from the past."""
        return replace(self, past=True)

    def strata(self) -> tuple[Stratum, ...]:
        """One: itself."""
        return (self,)

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        beside = (q // self.block - k // self.block).abs() <= 1
        first = self.global_blocks * self.block
        everywhere = (k < first) | ((q >= 0) & (q < first))
        return beside | everywhere | self._random().allowed(q, k, n)

    def intervals(self, lo: int, hi: int, n: int) -> list[Interval]:
        """Neighbours, random blocks, global blocks."""
        beside = ((lo // self.block - 1) * self.block, ((hi - 1) // self.block + 2) * self.block)
        return [(0, self.global_blocks * self.block), beside, *self._random().intervals(lo, hi, n)]

    def everywhere(self, n: int) -> Sequence[int]:
        """Queries of the global blocks."""
        return range(min(n, self.global_blocks * self.block))

    def covers(self, lo: int, hi: int) -> bool:
        """Rows of one block share their keys."""
        return lo // self.block == (hi - 1) // self.block
