"""The linear layers of attention: queries, keys, values and output."""

from __future__ import annotations

from dataclasses import dataclass

from longlens.models.parts.norm import Norm


@dataclass(frozen=True)
class Projections:
    """`bias`: of all four. `head_width`: width / heads where None. `scale` of the scores: head_width**-0.5 where None.
    `query_key_norm`: queries and keys are normalised over all heads together, before any rotation (ESM-C)."""

    bias: bool = True
    head_width: int | None = None
    scale: float | None = None
    query_key_norm: Norm | None = None

    def count(self, width: int, inner: int) -> int:
        """The number of parameters, with heads of `inner` in all."""
        norms = 2 * self.query_key_norm.count(inner) if self.query_key_norm else 0
        return 4 * width * inner + self.bias * (3 * inner + width) + norms
