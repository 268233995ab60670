"""Blocks, which the scan passes to collectors: a tile of the attention matrix of some heads, with its normalisers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longlens.ops.tiles.index import Index, positions, shift

LN2 = math.log(2.0)
# the exponent of masked pairs: finite, so that weight x exponent is 0 and not NaN
FLOOR = -1e30
# keys to a group of the two-level search for the largest, in rows of fewer than LONG keys, and in longer ones:
# to select 8 of n is quickest for n up to 64 and again, by another algorithm, from 512 on
GROUP, LONG_GROUP, LONG = 8, 64, 2**15


@dataclass(frozen=True)
class Extent:
    """The size of the attention matrix: B batch rows, H heads, Nq x Nk; and the dtype and device of its statistics."""

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


@dataclass(frozen=True)
class Places:
    """Where the tokens of sequences that were laid in padded batch rows belong: slot `slots[n]` of (sequences, length),
    flattened, holds token `tokens[n]` of the whole, in a sequence whose first token is `firsts[n]`. All (T,) int64.

    `heads`: the heads of the whole, a range of (B H), to which the sequences belong.
    """

    sequences: int
    heads: slice
    slots: Tensor
    tokens: Tensor
    firsts: Tensor

    def taken(self, padded: Tensor) -> Tensor:
        """(sequences H, length, ...) of padded rows -> (H, T, ...) of `tokens`."""
        by_head = padded.unflatten(0, (self.sequences, -1)).transpose(0, 1).flatten(1, 2)
        return by_head.index_select(1, self.slots)

    def put(self, whole: Tensor, padded: Tensor) -> None:
        """Write `padded` (sequences H, length, ...) to `whole` (B H, N, ...)."""
        whole[self.heads].index_copy_(1, self.tokens, self.taken(padded))

    def put_numbers(self, whole: Tensor, padded: Tensor) -> None:
        """`put` for numbers of tokens, which count from their sequence's first; -1 stays."""
        numbers = self.taken(padded)
        numbers = torch.where(numbers >= 0, numbers + self.firsts.view(1, -1, *(1,) * (numbers.ndim - 2)), numbers)
        whole[self.heads].index_copy_(1, self.tokens, numbers)


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
    # numbers of the sequence's first query and key in the whole input, and position of query 0 among the keys
    first_row: int
    first_key: int
    offset: int
    # the block holds every key of its rows
    whole: bool
    # some pairs are masked
    masked: bool
    groups: Tensor | None = None
    # the most of each row's largest weights that a collector reads
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
        """`rows` as numbered in the whole input."""
        return shift(self.rows, self.first_row)

    def absolute_keys(self) -> Index:
        """`keys` as numbered in the whole input."""
        return shift(self.keys, self.first_key)

    def largest(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest exponents of each row, or all, and their places in the block: (heads, rows, count)."""
        best, places = self._largest if count <= self.most else self._find_largest(count)
        return best[..., :count], places[..., :count]

    @cached_property
    def _largest(self) -> tuple[Tensor, Tensor]:
        return self._find_largest(self.most)

    def _find_largest(self, count: int) -> tuple[Tensor, Tensor]:
        """A search on two levels: the `count` largest are in the `count` groups of keys of largest maximum."""
        width = self.exponents.shape[-1]
        count = min(count, width)
        if self.groups is None or self.groups.shape[-1] <= count:
            return torch.topk(self.exponents, count)
        chosen = torch.topk(self.groups, count).indices
        stride = self.groups.shape[-1]
        group = _group(width)
        places = (chosen.unsqueeze(-1) + stride * torch.arange(group, device=chosen.device)).flatten(-2)
        candidates = self.exponents.gather(-1, places.clamp(max=width - 1))
        if stride * group > width:
            candidates = candidates.masked_fill_(places >= width, -torch.inf)
        best, where = torch.topk(candidates, count)
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
    largest = scores[..., : full * stride].unflatten(-1, (full, stride)).amax(-2)
    rest = width - full * stride
    if rest:
        largest[..., :rest] = torch.maximum(largest[..., :rest], scores[..., full * stride :])
    return largest


def _group(width: int) -> int:
    return GROUP if width < LONG else LONG_GROUP
