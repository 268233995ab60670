"""Fixed pattern of the Sparse Transformer: the own block, and summary columns of every block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from longlens.errors import MethodError
from longlens.ops.method import check_count
from longlens.ops.sparse.pattern import Pattern
from longlens.ops.sparse.strata import Intervals, Stratum
from longlens.ops.tiles.grid import Interval


@final
@dataclass(frozen=True)
class Fixed(Pattern, Intervals):
    """Fixed attention: j in the query's block of `stride`, or among the last `columns` of its block.

    Child et al. 2019 (arXiv:1904.10509), section 4.2, heads A(1) and A(2) with l = stride, c = columns, as one pattern
    and to both sides unless `is_causal`. Time N (stride + N columns / stride), memory N.
    """

    stride: int = 128
    columns: int = 8
    name: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        check_count("fixed", "stride", self.stride)
        check_count("fixed", "columns", self.columns, 0)
        if self.columns > self.stride:
            raise MethodError(f"fixed: expected columns <= stride, got {self.columns} > {self.stride}")

    @property
    def shift_invariant(self) -> bool:
        return False

    @property
    def block(self) -> int | None:
        """Queries of one block share their keys."""
        return self.stride

    def strata(self) -> tuple[Stratum, ...]:
        """One: itself."""
        return (self,)

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        return (k // self.stride == q // self.stride) | (k % self.stride >= self.stride - self.columns)

    def intervals(self, lo: int, hi: int, n: int) -> list[Interval]:
        """The rows' own blocks, and each block's summary columns."""
        own = (lo // self.stride * self.stride, ((hi - 1) // self.stride + 1) * self.stride)
        ends = range(self.stride, n + self.stride, self.stride)
        return [own, *((end - self.columns, end) for end in ends if self.columns)]

    def covers(self, lo: int, hi: int) -> bool:
        """Rows of one block share their keys."""
        return lo // self.stride == (hi - 1) // self.stride
