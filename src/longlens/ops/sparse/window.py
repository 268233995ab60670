"""Sliding window: each query meets its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from longlens.ops.method import check_count
from longlens.ops.sparse.pattern import Pattern
from longlens.ops.sparse.strata import Intervals, Stratum
from longlens.ops.tiles.grid import Interval


@final
@dataclass(frozen=True)
class Window(Pattern, Intervals):
    """Sliding-window attention: keys j with i - left <= j <= i + right (Longformer, Beltagy et al. 2020, section 3.1).

    `right` is `left` where None; under `is_causal` nothing right of the query is met. Both ends are inclusive, the
    query itself counts in neither: the paper's window w is Window(w / 2), transformers' `sliding_window` S is
    Window(S - 1, 0). Time N (left + right), memory N.
    """

    left: int = 256
    right: int | None = None
    name: ClassVar[str] = "window"
    # plain arithmetic on positions, which FlexAttention's compiler can trace
    traceable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("window", "left", self.left, 0)
        if self.right is not None:
            check_count("window", "right", self.right, 0)

    @property
    def reach(self) -> tuple[int, int]:
        """Keys to the left and to the right."""
        return self.left, self.left if self.right is None else self.right

    @property
    def shift_invariant(self) -> bool:
        return True

    @property
    def band(self) -> tuple[int, int]:
        """Keys to the left and to the right."""
        return self.reach

    def strata(self) -> tuple[Stratum, ...]:
        """One: itself."""
        return (self,)

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        left, right = self.reach
        return (k >= q - left) & (k <= q + right)

    def span(self, lo: int, hi: int, n: int) -> tuple[int, int]:
        left, right = self.reach
        return max(0, lo - left), max(0, min(n, hi + right))

    def clear(self, lo: int, hi: int, n: int) -> tuple[int, int]:
        left, right = self.reach
        a, b = max(0, hi - 1 - left), min(n, lo + right + 1)
        return (a, b) if a < b else (0, 0)

    def intervals(self, lo: int, hi: int, n: int) -> list[Interval]:
        """One range: the rows' windows together."""
        return [self.span(lo, hi, n)]
