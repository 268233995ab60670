"""Boundaries of packed sequences as numbers, read from the device once.

A model gives the same tensor of boundaries to every layer. Reading it back from a GPU waits each time for all the work
that was queued before, so what was read is kept for as long as the tensor lives and is not written to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# the numbers of a tensor, and its version when they were read
_READ: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def bounds_of(cu_seqlens: Tensor) -> tuple[int, ...]:
    """The boundaries (S + 1,) as integers."""
    if cu_seqlens.is_inference() or torch.compiler.is_compiling():
        # such a tensor does not count how often it was written to
        return tuple(cu_seqlens.tolist())
    version = cu_seqlens._version
    seen: tuple[int, tuple[int, ...]] | None = _READ.get(cu_seqlens)
    if seen is not None and seen[0] == version:
        return seen[1]
    bounds = tuple(cu_seqlens.tolist())
    _READ[cu_seqlens] = (version, bounds)
    return bounds


def know_bounds(cu_seqlens: Tensor, bounds: tuple[int, ...]) -> None:
    """Say what `cu_seqlens` holds, where that is known without reading it."""
    if not cu_seqlens.is_inference():
        _READ[cu_seqlens] = (cu_seqlens._version, bounds)
