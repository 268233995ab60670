"""A bias of distances as the mask that PyTorch's fused CPU operator takes: a view of one number a distance.

A bias that depends on j - i alone is a Toeplitz matrix: constant on each diagonal. With b[j - i + Nq - 1] in
memory, i and j the numbers of query and key, and the queries reversed, r = Nq - 1 - i, row r and column j read
b[r + j]: an ordinary view of strides (1, 1). Nq + Nk - 1 numbers a head stand for Nq x Nk, and the operator never
copies them.

A causal mask is a very small number at positive distances. A key mask depends on j alone: it is one more column of
queries and keys, whose product is 0 or very small.

Shapes here: query (B, H, Nq, D), reversed; key (B, Hkv, Nk, D); value alike; all of one width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# stands for -inf: sums of it are finite in every dtype, and a row without keys is known by its log-sum-exp
MASKED = -1e30
DEAD = -1e29
# queries to a block of a causal call: each is computed with half a block of keys too many
CAUSAL_ROWS = 512


@dataclass(frozen=True)
class Plan:
    """One call without its tensors.

    Keys lie at distances `lowest`..`highest` from queries. The biases of `low`..`high` are given, and beyond them the
    bias is that of the nearer end.
    """

    scale: float
    causal: bool
    key_mask: Tensor | None
    lowest: int
    highest: int
    low: int
    high: int


class Rows(NamedTuple):
    """Reversed queries start..stop, which meet the first `keys` keys."""

    start: int
    stop: int
    keys: int

    @property
    def cut(self) -> slice:
        return slice(self.start, self.stop)


class Operands(NamedTuple):
    """What the operator gets, and the bias (H, Nq + Nk - 1) of every distance, from `lowest` on."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor

    def mask(self, rows: Rows) -> Tensor:
        """The bias of a block of queries, (1, H, rows, keys): a view."""
        heads, length = self.bias.shape
        size = (1, heads, rows.stop - rows.start, rows.keys)
        return self.bias.as_strided(size, (0, length, 1, 1), rows.start)


def lay_out(query: Tensor, key: Tensor, value: Tensor, near: Tensor, plan: Plan) -> Operands:
    """The operands of a call whose biases of `low`..`high` are `near` (H, high - low + 1)."""
    distance = torch.arange(plan.lowest, plan.highest + 1)
    # a bias of -inf is a mask too
    bias = near.index_select(1, distance.clamp(plan.low, plan.high) - plan.low).clamp_(min=MASKED)
    if plan.causal:
        bias[:, distance > 0] = MASKED
    query = query.flip(2)
    if plan.key_mask is not None:
        query = F.pad(query, (0, 1), value=1.0 if plan.scale > 0 else -1.0)
        gone = key.new_zeros(plan.key_mask.shape).masked_fill_(~plan.key_mask, MASKED / abs(plan.scale))
        key = torch.cat([key, gone[:, None, :, None].expand(-1, key.shape[1], -1, -1)], 3)
    width = max(query.shape[3], value.shape[3])
    return Operands(to_width(query, width), to_width(key, width), to_width(value, width), bias)


def to_width(tensor: Tensor, width: int) -> Tensor:
    """Zero columns up to `width`, and rows of adjacent numbers, as the operator reads them."""
    if tensor.shape[3] < width:
        return F.pad(tensor, (0, width - tensor.shape[3]))
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def blocks(plan: Plan, queries: int, keys: int) -> Iterator[Rows]:
    """Blocks of reversed queries and their keys, the most keys first. Queries that meet none are in no block."""
    if not plan.causal:
        yield Rows(0, queries, keys)
        return
    # the first of a block's reversed rows is its last query
    for start in range(0, min(queries, keys), CAUSAL_ROWS):
        yield Rows(start, min(start + CAUSAL_ROWS, queries), keys - start)
