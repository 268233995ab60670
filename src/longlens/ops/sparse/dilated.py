"""Dilated window: a window with gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from longlens.ops.method import check_count
from longlens.ops.sparse.pattern import Pattern
from longlens.ops.sparse.strata import Stratum, StridedKeys


@final
@dataclass(frozen=True)
class Dilated(Pattern):
    """Dilated sliding window: keys j = i + m dilation, |m| <= window (Longformer, Beltagy et al. 2020, section 3.1).

    `window` keys on each side, `dilation` apart: a reach of window x dilation for 2 window + 1 pairs a query. Queries
    and keys of one residue class modulo `dilation` are walked together, so that no pair in the gaps is computed. Time
    N window, memory N.
    """

    window: int = 128
    dilation: int = 2
    name: ClassVar[str] = "dilated"

    def __post_init__(self) -> None:
        check_count("dilated", "window", self.window, 0)
        check_count("dilated", "dilation", self.dilation)

    def strata(self) -> tuple[Stratum, ...]:
        """Strided keys of step `dilation`."""
        return (StridedKeys(self.dilation, self.window, self.window),)
