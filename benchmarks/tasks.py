"""One attention problem and one call of it: what contenders are built for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FEATURES, LANDMARKS, RANK, WINDOW, BLOCK = 256, 64, 256, 256, 64


@dataclass(frozen=True)
class Task:
    """One attention problem: batch 1, `heads` heads, `length` queries and keys of `width`, standard normal."""

    length: int
    heads: int = 8
    width: int = 64
    dtype: str = "float32"
    backward: bool = False
    device: str = "cpu"

    def draw(self, value_width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (1, heads, length, width), the same for every contender."""
        generator = torch.Generator().manual_seed(0)

        def normal(width: int) -> Tensor:
            shape = (1, self.heads, self.length, width)
            return torch.randn(shape, generator=generator).to(self.device, getattr(torch, self.dtype))

        return normal(self.width), normal(self.width), normal(value_width or self.width)


@dataclass(frozen=True)
class Call:
    """A call ready to be timed: `run()` gives the output, whose gradient goes to `leaves`.

    `output` turns what `run` returns into (1, H, N, Dv) and `query_grad` the gradients of `leaves` into that of the
    query.
    """

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    output: Callable[[Tensor], Tensor] = lambda out: out
    query_grad: Callable[[tuple[Tensor, ...]], Tensor] = lambda grads: grads[0]


def keep(task: Task) -> Tensor:
    """(1, N) bool: the last eighth of the keys is padding."""
    return (torch.arange(task.length, device=task.device) < task.length - task.length // 8).unsqueeze(0)


def leaves(task: Task, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.requires_grad_(task.backward) for tensor in tensors)


def projections(task: Task) -> tuple[Tensor, Tensor]:
    """Linformer's projections of keys and values over the length, (RANK, N) each, as random as before training."""
    generator = torch.Generator().manual_seed(3)
    drawn = (torch.rand(2, RANK, task.length, generator=generator) * 2 - 1) * RANK**-0.5
    return drawn.to(task.device, getattr(torch, task.dtype)).unbind(0)
