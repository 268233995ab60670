"""Attention as a model calls it, and `longlens.attention` in that form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longlens.ops.attention import attention
from longlens.ops.biases import Bias
from longlens.ops.method import Method


class Attend(Protocol):
    """Attention as a model calls it: query, key, value (1, H, T, D) of packed sequences -> (1, H, T, D)."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, cu_seqlens: Tensor,
        bias: Bias | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend within each sequence; `layer` counts from 0, `bias` is added to the scores (T5)."""


@dataclass(frozen=True)
class AttendWith:
    """`longlens.attention` by one method in every layer."""

    method: Method | str = "exact"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, cu_seqlens: Tensor,
        bias: Bias | None = None,
    ) -> Tensor:  # fmt: skip
        output = attention(query, key, value, scale=scale, cu_seqlens=cu_seqlens, method=self.method, bias=bias)
        assert isinstance(output, Tensor)
        return output

    def with_lse(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, cu_seqlens: Tensor, bias: Bias | None = None
    ) -> list[Tensor]:
        """Output and log-sum-exp (1, H, T)."""
        return [*attention(
            query, key, value, scale=scale, cu_seqlens=cu_seqlens, method=self.method, bias=bias, return_lse=True
        )]  # fmt: skip


def attend_with(method: Method | str = "exact") -> Attend:
    """`longlens.attention` by one method in every layer."""
    return AttendWith(method)
