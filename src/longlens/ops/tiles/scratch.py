"""Memory for temporaries of a tile's size, used again from one tile to the next."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class Scratch:
    """Named temporaries; each holds what was last written to it until its name is asked for again.

    A fresh allocation of some MiB for every tile is mapped and unmapped by the system each time, which can take longer
    than the arithmetic on it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[str, Tensor] = {}

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of this shape, in the memory called `name`."""
        count = prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < count or memory.dtype != dtype:
            memory = self._memory[name] = torch.empty(count, dtype=dtype, device=self._device)
        return memory[:count].view(*shape)
