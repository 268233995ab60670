"""What the scan hands to collectors: one tile of the attention matrix, for some heads, with its rows' normalisers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longlens.ops.tiles.index import Index, positions, shift

LN2 = math.log(2.0)
# masked scores stand this far below their row's largest, so that weight x logarithm is 0 and not NaN
FLOOR = -1e30
# keys to a group of the two-level search for the largest, in rows of fewer than LONG keys, and in longer ones:
# to select 8 of n is quickest for n up to 64 and again, by another algorithm, from 512 on
GROUP, LONG_GROUP, LONG = 8, 64, 2**15


@dataclass(frozen=True)
class Extent:
    """The whole attention matrix: B batch rows, H heads, Nq x Nk, and where results live."""

    batch: int
    heads: int
    queries: int
    keys: int
    dtype: torch.dtype
    device: torch.device

    def zeros(self, *shape: int) -> Tensor:
        """(B H, ...) zeros in the statistics' dtype."""
        return torch.zeros(self.batch * self.heads, *shape, dtype=self.dtype, device=self.device)

    def by_head(self, tensor: Tensor) -> Tensor:
        """(B H, ...) -> (B, H, ...)."""
        return tensor.unflatten(0, (self.batch, self.heads))


@dataclass
class Block:
    """Weights p = e x inverse of queries `rows` and keys `keys`, for `heads`, a range of all batch rows' heads (B H,).

    `rows`, `keys` number tokens within their sequence: a range, (m,), or (heads, m). `exponents` (heads, rows, keys) is
    s / log 2 minus a number for each row, `e` is 2 to that power (several times quicker than a power of e), `inverse`
    and `log_total` (heads, rows, 1) turn it into weights: p = e inverse, log2 p = exponents - log_total. Rows may come
    in several blocks, each pair in one.
    """

    heads: slice
    rows: Index
    keys: Index
    exponents: Tensor
    e: Tensor
    inverse: Tensor
    log_total: Tensor
    lse: Tensor
    # first query and key of the sequence in the whole, and position of query 0 among its keys
    first_row: int
    first_key: int
    offset: int
    # every key of these rows is here
    whole: bool
    # some pairs are masked
    masked: bool
    groups: Tensor | None = None
    # how many of each row's largest are read by some collector
    most: int = 0

    @cached_property
    def weights(self) -> Tensor:
        """p (heads, rows, keys)."""
        return self.e * self.inverse

    @cached_property
    def allowed(self) -> Tensor | None:
        """Bool (heads, rows, keys): pairs that attend; None where all do."""
        return self.exponents > FLOOR / 2 if self.masked else None

    @cached_property
    def weighted_exponents(self) -> Tensor:
        """Sum over the keys of e times its exponent: (heads, rows, 1)."""
        return torch.linalg.vecdot(self.e, self.exponents).unsqueeze(-1)

    @cached_property
    def total(self) -> Tensor:
        """Sum over the keys of e: (heads, rows, 1)."""
        return self.e.sum(-1, keepdim=True)

    @property
    def query_positions(self) -> Tensor:
        """(rows,) or (heads, rows): among the keys of the sequence."""
        return positions(self.rows, self.offset, self.e.device)

    @property
    def key_positions(self) -> Tensor:
        """(keys,) or (heads, keys)."""
        return positions(self.keys, 0, self.e.device)

    def distances(self) -> Tensor:
        """|i - j|, (rows, keys) or (heads, rows, keys), in the statistics' dtype."""
        return (self.query_positions.unsqueeze(-1) - self.key_positions.unsqueeze(-2)).abs().to(self.e.dtype)

    def absolute_rows(self) -> Index:
        """`rows` in the numbering of the whole."""
        return shift(self.rows, self.first_row)

    def absolute_keys(self) -> Index:
        """`keys` in the numbering of the whole."""
        return shift(self.keys, self.first_key)

    def largest(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest exponents of each row, or all, and their places in the block: (heads, rows, count)."""
        best, places = self._largest if count <= self.most else self._find_largest(count)
        return best[..., :count], places[..., :count]

    @cached_property
    def _largest(self) -> tuple[Tensor, Tensor]:
        return self._find_largest(self.most)

    def _find_largest(self, count: int) -> tuple[Tensor, Tensor]:
        """Two levels: the `count` largest lie in the `count` groups of keys with the largest."""
        width = self.exponents.shape[-1]
        count = min(count, width)
        if self.groups is None or self.groups.shape[-1] <= count:
            return torch.topk(self.exponents, count)
        chosen = torch.topk(self.groups, count).indices
        stride = self.groups.shape[-1]
        group = _group(width)
        places = (chosen.unsqueeze(-1) + stride * torch.arange(group, device=chosen.device)).flatten(-2)
        found = self.exponents.gather(-1, places.clamp(max=width - 1))
        if stride * group > width:
            found = found.masked_fill_(places >= width, -torch.inf)
        best, where = torch.topk(found, count)
        return best, places.gather(-1, where)


def group_largest(scores: Tensor) -> Tensor | None:
    """(heads, rows, groups): the largest of keys g, g + G, g + 2 G, ...; None where grouping does not pay.

    Groups are strided so that the maximum is taken over whole vectors of neighbouring keys.
    """
    width = scores.shape[-1]
    group = _group(width)
    if width < 64 * group:
        return None
    stride = -(-width // group)
    full = width // stride
    found = scores[..., : full * stride].unflatten(-1, (full, stride)).amax(-2)
    rest = width - full * stride
    if rest:
        found[..., :rest] = torch.maximum(found[..., :rest], scores[..., full * stride :])
    return found


def _group(width: int) -> int:
    return GROUP if width < LONG else LONG_GROUP
