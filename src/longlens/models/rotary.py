"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), in the half-split form that ESM-2 was trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Angles position x frequency. The frequencies are a buffer that checkpoints fill.

    ESM-2's are rounded to float16; computing them in float32 changes the angle at position 34,350 by 5 rad.
    """

    frequencies: Tensor

    def __init__(self, head_width: int, base: float = 10_000.0) -> None:
        super().__init__()
        # a quotient, as the models were trained: the power of the negative exponent is rounded to other numbers
        self.register_buffer("frequencies", 1.0 / base ** (torch.arange(0, head_width, 2).float() / head_width))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions (T,): two (T, D / 2), in float32, since half precision cannot tell positions
        apart."""
        angles = torch.outer(positions.float(), self.frequencies.float())
        return angles.cos(), angles.sin()

    def _apply(self, fn: Any, recurse: bool = True) -> Rotary:
        """A cast of the model leaves the frequencies in float32; only their device follows."""
        frequencies = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = frequencies.to(self.frequencies.device)
        return self


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (i, i + D / 2) of x (T, ..., D) by `angles` (T, D / 2); computed in float32 (float64 for float64),
    returned in x's dtype."""
    return torch.cat(_rotated(x, angles), -1).to(x.dtype)


def rotate_in_place(x: Tensor, angles: tuple[Tensor, Tensor]) -> None:
    """`rotate`, written over `x`, which needs no gradient."""
    for half, rotated in zip(x.chunk(2, -1), _rotated(x, angles), strict=True):
        half.copy_(rotated)


def _rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both halves, in memory of their own."""
    a, b = (x if x.dtype == torch.float64 else x.float()).chunk(2, -1)
    cos, sin = (part.view(len(part), *(1,) * (x.ndim - 2), -1) for part in angles)
    return (a * cos).addcmul_(b, sin, value=-1.0), (b * cos).addcmul_(a, sin)
