"""Longformer: a window and a few global tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from longlens.ops.sparse.global_tokens import Global
from longlens.ops.sparse.pattern import Pattern
from longlens.ops.sparse.strata import Stratum
from longlens.ops.sparse.window import Window


@final
@dataclass(frozen=True)
class Longformer(Pattern):
    """Longformer's pattern: Window(window) | Global(global_tokens) (Beltagy et al. 2020, arXiv:2004.05150, section
    3.1).

    `window` keys on each side (the paper's w is twice that); `global_tokens` are positions. One set of projections
    serves local and global attention: the paper's separate global ones are a matter for the model. Time N (window +
    g), memory N.
    """

    window: int = 256
    global_tokens: tuple[int, ...] = (0,)
    name: ClassVar[str] = "longformer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_tokens", Global(self.global_tokens).tokens)
        Window(self.window)

    def strata(self) -> tuple[Stratum, ...]:
        """A window and the global tokens."""
        return (Window(self.window), Global(self.global_tokens))
