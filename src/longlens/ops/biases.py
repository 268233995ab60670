"""Additive biases as rules on positions, with gradients where they are learned; never an N x N tensor unless given one.

A bias is added to the scaled scores before masking: softmax(scale q k^T + bias).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longlens.errors import MaskError
from longlens.ops.masks import _cut


class Bias(ABC):
    """What is added to the score of each pair of positions."""

    @property
    def by_distance(self) -> bool:
        """True where the bias depends on key position minus query position alone, which `at` then takes."""
        return False

    @property
    def reach(self) -> int | None:
        """A distance from which on, in either direction, the bias of a distance stays the same; None where none is
        known."""
        return None

    def at(self, distance: Tensor) -> Tensor:
        """The bias (H, n) of distances (n,), key position minus query position; differentiable in `parameters()`."""
        raise NotImplementedError

    def between(self, low: int, high: int) -> Tensor:
        """`at` of the distances `low`..`high`, on a CPU."""
        return self.at(torch.arange(low, high + 1))

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

    def of_heads(self, heads: Sequence[int]) -> Bias | None:
        """The bias for some query heads alone, or None where that is not a bias of this kind."""
        return None

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

    @property
    def by_distance(self) -> bool:
        return True

    def at(self, distance: Tensor) -> Tensor:
        return -self.slopes().to(distance.device).unsqueeze(1) * distance.abs()

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

    Raises `MaskError` for another table or kind, an even number of buckets for "clip", and for T5's kinds without a
    bucket of one distance or with a `max_distance` that these buckets reach.
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
        exact = self._exact
        if self.kind != "clip" and not 1 <= exact < self.max_distance:
            least = 4 if self.kind == "t5" else 2
            raise MaskError(
                f"expected at least {least} buckets for kind {self.kind!r}, and a max_distance above the {exact} that "
                f"have a bucket of their own, got {self.table.shape[1]} buckets and {self.max_distance}"
            )

    @property
    def _exact(self) -> int:
        """How many distances of one direction have a bucket of their own, in T5's kinds."""
        return self.table.shape[1] // (4 if self.kind == "t5" else 2)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each key position minus query position."""
        return _bucket(self.kind, self.table.shape[1], self.max_distance, distance)

    @property
    def by_distance(self) -> bool:
        return True

    @property
    def reach(self) -> int | None:
        buckets = self.table.shape[1]
        if self.kind == "clip":
            return buckets // 2
        return _reach_of_t5(self.kind, buckets, self.max_distance)

    def at(self, distance: Tensor) -> Tensor:
        return self.table[:, self.bucket(distance)]

    def between(self, low: int, high: int) -> Tensor:
        if high - low >= _KEPT:
            return super().between(low, high)
        return self.table[:, _buckets_between(self.kind, self.table.shape[1], self.max_distance, low, high)]

    def tile(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        first, last = _consecutive(q.reshape(-1)), _consecutive(k.reshape(-1))
        if first is None or last is None:
            return self.table[:, self.bucket(k - q)]
        # one number for each diagonal of the tile; row r of the last query first reads from r on
        values = self.at(torch.arange(last[0] - first[1], last[1] - first[0] + 1, device=k.device))
        heads, rows, columns = len(values), q.numel(), k.numel()
        return values.as_strided((heads, rows, columns), (values.shape[1], 1, 1)).flip(1)

    def parameters(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def with_parameters(self, parameters: tuple[Tensor, ...]) -> Bias:
        return RelativePosition(parameters[0], self.kind, self.max_distance)

    def of_heads(self, heads: Sequence[int]) -> Bias:
        return RelativePosition(self.table[list(heads)], self.kind, self.max_distance)

    def accumulate(self, grads: tuple[Tensor, ...], d_tile: Tensor, q: Tensor, k: Tensor, n: int) -> None:
        d_tile = d_tile.sum(0)
        first, last = _consecutive(q.reshape(-1)), _consecutive(k.reshape(-1))
        if first is None or last is None:
            grads[0].index_add_(1, self.bucket(k - q).reshape(-1), d_tile.flatten(1).to(grads[0].dtype))
            return
        distance = torch.arange(last[0] - first[1], last[1] - first[0] + 1, device=k.device)
        grads[0].index_add_(1, self.bucket(distance), diagonal_sums(d_tile).to(grads[0].dtype))

    def check(self, heads: int) -> None:
        if heads != self.table.shape[0]:
            raise MaskError(f"expected a table for {heads} query heads, got {tuple(self.table.shape)}")


def _consecutive(positions: Tensor) -> tuple[int, int] | None:
    """The first and the last of positions that rise by 1; None where they do not, or lie on an accelerator, which it
    would stall to ask."""
    if positions.device.type != "cpu" or not len(positions):
        return None
    first, last = int(positions[0]), int(positions[-1])
    steps = len(positions) - 1
    if last - first != steps or not bool((positions.diff() == 1).all()):
        return None
    return first, last


def diagonal_sums(tile: Tensor) -> Tensor:
    """(H, m, n) -> (H, m + n - 1): the sums of each diagonal, from that of the last row and first column on."""
    heads, rows, columns = tile.shape
    width = rows + columns - 1
    # row r moved by rows - 1 - r columns: the diagonals stand upright
    upright = tile.new_zeros(heads, rows, width)
    skewed(upright, columns).copy_(tile)
    return upright.sum(1)


def skewed(upright: Tensor, columns: int) -> Tensor:
    """The part of a contiguous `upright` (H, m, m + n - 1) whose row r begins at column m - 1 - r: a view (H, m, n)."""
    heads, rows, width = upright.shape
    return upright.as_strided(
        (heads, rows, columns), (rows * width, max(1, width - 1), 1), upright.storage_offset() + rows - 1
    )


# distances whose buckets are kept from one call to the next: a pack has many sequences, and a model many layers
_KEPT = 1024


def _bucket(kind: str, buckets: int, max_distance: int, distance: Tensor) -> Tensor:
    """The bucket of each distance: `RelativePosition.bucket`."""
    if kind == "clip":
        reach = buckets // 2
        return distance.clamp(-reach, reach) + reach
    ahead = torch.zeros_like(distance)
    back = (-distance).clamp(min=0)
    if kind == "t5":
        buckets //= 2
        ahead, back = (distance > 0).long() * buckets, distance.abs()
    exact = buckets // 2
    far = exact + (
        torch.log(back.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    ).long().clamp(max=buckets - exact - 1)
    return ahead + torch.where(back < exact, back, far)


@lru_cache(256)
def _buckets_between(kind: str, buckets: int, max_distance: int, low: int, high: int) -> Tensor:
    # a tensor of inference mode could not be part of a later graph
    with torch.inference_mode(False):
        return _bucket(kind, buckets, max_distance, torch.arange(low, high + 1))


@lru_cache(256)
def _reach_of_t5(kind: str, buckets: int, max_distance: int) -> int:
    """T5's last bucket begins before `max_distance`, and from there on nothing changes."""
    back = _bucket(kind, buckets, max_distance, -torch.arange(max_distance + 1))
    return int((back != back[-1]).sum())


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
