"""Rows and keys by number, and how tensors are read and written there: the one set of indexing helpers.

Shapes here: tensors are (BH, N, ...), with batch rows and heads flattened into one axis, of which `heads` is a range;
an index of a tile may also number each head's own rows, (B, H, m), and `of_heads` cuts it to the range, (heads, m).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

# a range (with step), numbers for all heads (m,), or numbers for each head: (B, H, m), or (heads, m) after `of_heads`
Index: TypeAlias = slice | Tensor


def size(index: Index) -> int:
    """How many rows or keys an index means."""
    if isinstance(index, slice):
        return len(range(index.start, index.stop, index.step or 1))
    return index.shape[-1]


def positions(index: Index, offset: int, device: torch.device) -> Tensor:
    """The positions that an index means, offset added: (m,), or (..., m) where heads have numbers of their own."""
    if isinstance(index, slice):
        return torch.arange(index.start + offset, index.stop + offset, index.step or 1, device=device)
    return index + offset


def shift(index: Index, by: int) -> Index:
    """The index with `by` added to each number."""
    if isinstance(index, slice):
        return slice(index.start + by, index.stop + by, index.step)
    return index + by


def part(index: Index, a: int, b: int) -> Index:
    """Entries a..b of an index."""
    if isinstance(index, slice):
        step = index.step or 1
        return slice(index.start + a * step, min(index.stop, index.start + b * step), index.step)
    return index[..., a:b]


def of_heads(index: Index, heads: slice) -> Index:
    """The index for a range of heads: (B, H, m) becomes (heads, m), others stay as they are."""
    if isinstance(index, slice) or index.ndim < 3:
        return index
    return index.flatten(0, 1)[heads]


def expanded(index: Index, heads: int, device: torch.device) -> Tensor:
    """Any index as (heads, m)."""
    return positions(index, 0, device).expand(heads, size(index))


def take(tensor: Tensor, heads: slice, index: Index) -> Tensor:
    """tensor[heads, index]: (heads, m, ...)."""
    rows = tensor[heads]
    if isinstance(index, slice):
        return rows[:, index]
    if index.ndim == 1:
        return rows.index_select(1, index)
    return rows.gather(1, _like(index, rows))


def put(tensor: Tensor, heads: slice, index: Index, values: Tensor) -> None:
    """tensor[heads, index] = values."""
    rows = tensor[heads]
    if isinstance(index, slice):
        rows[:, index] = values
    elif index.ndim == 1:
        rows.index_copy_(1, index, values.to(tensor.dtype))
    else:
        rows.scatter_(1, _like(index, rows), values.to(tensor.dtype))


def add(tensor: Tensor, heads: slice, index: Index, values: Tensor) -> None:
    """tensor[heads, index] += values; numbers may repeat."""
    rows = tensor[heads]
    if isinstance(index, slice):
        rows[:, index] += values
    elif index.ndim == 1:
        rows.index_add_(1, index, values.to(tensor.dtype))
    else:
        rows.scatter_add_(1, _like(index, rows), values.to(tensor.dtype))


def maximise(tensor: Tensor, heads: slice, index: Index, values: Tensor) -> None:
    """tensor[heads, index] = max(itself, values); numbers may repeat."""
    rows = tensor[heads]
    if isinstance(index, slice):
        torch.maximum(rows[:, index], values, out=rows[:, index])
    else:
        rows.scatter_reduce_(1, _like(index.expand(len(rows), -1), rows), values, "amax")


def _like(index: Tensor, rows: Tensor) -> Tensor:
    """(heads, m) -> (heads, m, ...) as `rows` has more axes."""
    return index.view(*index.shape, *(1,) * (rows.ndim - 2)).expand(*index.shape, *rows.shape[2:])
