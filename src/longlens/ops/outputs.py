"""What a method of attention returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionOutput(NamedTuple):
    """`output` (B, H, Nq, Dv) and, where asked for, `lse` (B, H, Nq) float32 (float64 for float64 inputs)."""

    output: Tensor
    lse: Tensor | None
