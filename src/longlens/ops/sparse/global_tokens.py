"""Global tokens: a few that see everyone and are seen by everyone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from longlens.errors import MethodError
from longlens.ops.method import LARGEST, shorten
from longlens.ops.sparse.pattern import Pattern
from longlens.ops.sparse.strata import Intervals, Stratum
from longlens.ops.tiles.grid import Interval


@final
@dataclass(frozen=True)
class Global(Pattern, Intervals):
    """Global attention: i meets j where i or j is in `tokens` (Longformer, Beltagy et al. 2020, section 3.1).

    `tokens` are positions from 0. A query that is not global meets the global keys only: combine with others,
    `Window(256) | Global((0,))`. Time N g for g tokens, memory N.
    """

    tokens: tuple[int, ...] = (0,)
    name: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        chosen: object = self.tokens
        tokens = (chosen,) if isinstance(chosen, int) else tuple(chosen) if isinstance(chosen, Sequence) else (None,)
        if any(not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= LARGEST for token in tokens):
            raise MethodError(f"global: expected tokens to be positions of 0 to {LARGEST}, got {shorten(chosen)}")
        object.__setattr__(self, "tokens", tuple(sorted({token for token in tokens if isinstance(token, int)})))

    @property
    def shift_invariant(self) -> bool:
        return False

    def strata(self) -> tuple[Stratum, ...]:
        """One: itself."""
        return (self,)

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        tokens = torch.tensor(self.tokens, device=k.device, dtype=k.dtype)
        return torch.isin(k, tokens) | torch.isin(q, tokens)

    def intervals(self, lo: int, hi: int, n: int) -> list[Interval]:
        """The global keys."""
        return [(token, token + 1) for token in self.tokens]

    def everywhere(self, n: int) -> Sequence[int]:
        """The global queries."""
        return self.tokens

    def covers(self, lo: int, hi: int) -> bool:
        """Every query meets every global key."""
        return True
