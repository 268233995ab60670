"""Boundaries of packed sequences as numbers, read from the device once.

A model gives the same tensor of boundaries to every layer. Reading it back from a GPU waits each time for all the work
that was queued before, so what was read is kept for as long as the tensor lives and is not written to, as its version
tells; writing through `.data` does not change the version, and is not seen. On a CPU nothing is kept: reading waits for
nothing there, and NumPy's array of the same memory may be written to, which changes no version either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# the numbers of a tensor, and its version when they were read
_READ: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def bounds_of(cu_seqlens: Tensor) -> tuple[int, ...]:
    """The boundaries (S + 1,) as integers."""
    if not _is_kept(cu_seqlens) or torch.compiler.is_compiling():
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
    if _is_kept(cu_seqlens):
        _READ[cu_seqlens] = (cu_seqlens._version, bounds)


def _is_kept(cu_seqlens: Tensor) -> bool:
    # a tensor of inference mode does not count how often it was written to
    return cu_seqlens.device.type != "cpu" and not cu_seqlens.is_inference()
