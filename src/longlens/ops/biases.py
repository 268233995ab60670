"""Additive biases as rules on positions, with gradients where they are learned; never an N x N tensor unless given one.

A bias is added to the scaled scores before masking: softmax(scale q k^T + bias).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from longlens.errors import MaskError
from longlens.ops.masks import _cut


class Bias(ABC):
    """What is added to the score of each pair of positions."""

    @abstractmethod
    def tile(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        """The bias of queries `q` (queries, 1) and keys `k` (1, keys), broadcastable to (B, H, queries, keys)."""

    def parameters(self) -> tuple[Tensor, ...]:
        """Tensors that may need a gradient."""
        return ()

    def with_parameters(self, parameters: tuple[Tensor, ...]) -> Bias:
        """The same bias on other parameters (as autograd hands them over)."""
        return self

    def accumulate(self, grads: tuple[Tensor, ...], d_tile: Tensor, q: Tensor, k: Tensor, n: int) -> None:
        """Add the gradient of one tile, `d_tile` (B, H, queries, keys), to `grads`, shaped as `parameters()`."""

    def segment(self, start: int, stop: int) -> Bias:
        """The bias for packed tokens start..stop, whose positions start at 0."""
        return self

    def row(self, index: int) -> Bias:
        """The bias for batch row `index` alone."""
        return self

    def check(self, heads: int) -> None:
        """Raise `MaskError` unless the bias fits `heads` query heads."""


@dataclass(frozen=True)
class Alibi(Bias):
    """ALiBi: -slope_h |i - j|, slopes a geometric series (Press et al. 2022, arXiv:2108.12409, section 3).

    For `heads` a power of two the slopes are 2^(-8 h / heads), h = 1..heads; otherwise the paper's released rule: the
    slopes of the next smaller power of two, then every other one of the next larger.
    """

    heads: int

    def slopes(self) -> Tensor:
        """(heads,) float32."""

        def series(count: int) -> list[float]:
            return [2.0 ** (-8.0 * (place + 1) / count) for place in range(count)]

        power = 2 ** math.floor(math.log2(self.heads))
        return torch.tensor((series(power) + series(2 * power)[::2])[: self.heads])

    def tile(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        return -self.slopes().to(k.device).view(-1, 1, 1) * (q - k).abs()

    def check(self, heads: int) -> None:
        if heads != self.heads:
            raise MaskError(f"expected Alibi({heads}) for {heads} query heads, got Alibi({self.heads})")


@dataclass(frozen=True, eq=False)
class RelativePosition(Bias):
    """A learned table of relative positions with its gradient: `table` (H, buckets), read at the bucket of j - i.

    `kind="clip"`: buckets = 2 R + 1, distances clipped to -R..R (Shaw et al. 2018, arXiv:1803.02155, section 3.2).
    `kind="t5"` / `"t5-causal"`: T5's buckets, half exact, half logarithmic up to `max_distance` (Raffel et al. 2020,
    arXiv:1910.10683, section 2.1), for both directions or the past alone. Gradient memory is that of the table.
    """

    table: Tensor
    kind: str = "clip"
    max_distance: int = 128

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or not self.table.is_floating_point():
            raise MaskError(
                f"expected a floating table (heads, buckets), got {self.table.dtype} {tuple(self.table.shape)}"
            )
        if self.kind not in ("clip", "t5", "t5-causal"):
            raise MaskError(f"expected kind 'clip', 't5' or 't5-causal', got {self.kind!r}")
        if self.kind == "clip" and self.table.shape[1] % 2 == 0:
            raise MaskError(f"expected an odd number of buckets (2 R + 1) for kind 'clip', got {self.table.shape[1]}")

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each key position minus query position."""
        buckets = self.table.shape[1]
        if self.kind == "clip":
            reach = buckets // 2
            return distance.clamp(-reach, reach) + reach
        ahead = torch.zeros_like(distance)
        back = (-distance).clamp(min=0)
        if self.kind == "t5":
            buckets //= 2
            ahead, back = (distance > 0).long() * buckets, distance.abs()
        exact = buckets // 2
        far = exact + (
            torch.log(back.clamp(min=1).float() / exact) / math.log(self.max_distance / exact) * (buckets - exact)
        ).long().clamp(max=buckets - exact - 1)
        return ahead + torch.where(back < exact, back, far)

    def tile(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        return self.table[:, self.bucket(k - q)]

    def parameters(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def with_parameters(self, parameters: tuple[Tensor, ...]) -> Bias:
        return RelativePosition(parameters[0], self.kind, self.max_distance)

    def accumulate(self, grads: tuple[Tensor, ...], d_tile: Tensor, q: Tensor, k: Tensor, n: int) -> None:
        bucket = self.bucket(k - q).reshape(-1)
        grads[0].index_add_(1, bucket, d_tile.sum(0).flatten(1).to(grads[0].dtype))

    def check(self, heads: int) -> None:
        if heads != self.table.shape[0]:
            raise MaskError(f"expected a table for {heads} query heads, got {tuple(self.table.shape)}")


@dataclass(frozen=True, eq=False)
class TensorBias(Bias):
    """A tensor (B|1, H|1, Nq|1, Nk|1), with its gradient: the escape hatch, quadratic where Nq x Nk is given."""

    tensor: Tensor

    def _index(self, q: Tensor, k: Tensor, n: int) -> tuple[Tensor, Tensor]:
        rows = (q - (n - self.tensor.shape[2])).clamp(0, self.tensor.shape[2] - 1)
        return rows, k.clamp(max=self.tensor.shape[3] - 1)

    def tile(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        rows, columns = self._index(q, k, n)
        return self.tensor[..., rows, columns]

    def parameters(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def with_parameters(self, parameters: tuple[Tensor, ...]) -> Bias:
        return TensorBias(parameters[0])

    def accumulate(self, grads: tuple[Tensor, ...], d_tile: Tensor, q: Tensor, k: Tensor, n: int) -> None:
        for axis in range(4):
            if self.tensor.shape[axis] == 1:
                d_tile = d_tile.sum(axis, keepdim=True)
        rows, columns = self._index(q, k, n)
        rows = rows[:1] if self.tensor.shape[2] == 1 else rows
        columns = columns[:, :1] if self.tensor.shape[3] == 1 else columns
        grads[0][..., rows, columns] += d_tile.to(grads[0].dtype)

    def segment(self, start: int, stop: int) -> Bias:
        return TensorBias(_cut(_cut(self.tensor, 2, start, stop), 3, start, stop))

    def row(self, index: int) -> Bias:
        return TensorBias(_cut(self.tensor, 0, index, index + 1))
