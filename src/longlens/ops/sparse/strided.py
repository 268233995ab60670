"""Strided pattern of the Sparse Transformer: the recent past, and one key in every stride."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from longlens.ops.method import check_count
from longlens.ops.sparse.pattern import Pattern
from longlens.ops.sparse.strata import Stratum, StridedKeys
from longlens.ops.sparse.window import Window


@final
@dataclass(frozen=True)
class Strided(Pattern):
    """Strided attention: |i - j| <= stride, or stride divides i - j (Child et al. 2019, section 4.2).

    The paper's two heads A(1) (the last l positions) and A(2) (every l-th) as one pattern, and to both sides unless
    `is_causal`. Time N (stride + N / stride), least near stride = sqrt(N); memory N.
    """

    stride: int = 128
    name: ClassVar[str] = "strided"

    def __post_init__(self) -> None:
        check_count("strided", "stride", self.stride)

    def strata(self) -> tuple[Stratum, ...]:
        """A window and strided keys."""
        return (Window(self.stride), StridedKeys(self.stride))
