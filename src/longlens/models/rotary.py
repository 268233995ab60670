"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), in the half-split form that ESM-2 was trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Angles position x frequency. The frequencies are a buffer that checkpoints fill.

    ESM-2's are rounded to float16; recomputing them in float32 makes another function, by 5 rad at position 34,350.
    """

    frequencies: Tensor

    def __init__(self, head_width: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", base ** (-torch.arange(0, head_width, 2).float() / head_width))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions (T,): two (T, D / 2), in float32, since half precision cannot tell positions
        apart."""
        angles = torch.outer(positions.float(), self.frequencies.float())
        return angles.cos(), angles.sin()

    def _apply(self, fn: Any, recurse: bool = True) -> Rotary:
        """A cast of the model leaves the frequencies in float32; only their device follows."""
        kept = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = kept.to(self.frequencies.device)
        return self


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (i, i + D / 2) of x (T, H, D) by `angles` (T, D / 2); computed in float32, returned in x's dtype."""
    cos, sin = (part.unsqueeze(1) for part in angles)
    half = x.shape[-1] // 2
    out = torch.empty_like(x) if not x.requires_grad else None
    a, b = x[..., :half], x[..., half:]
    left, right = a * cos - b * sin, b * cos + a * sin
    if out is None:
        return torch.cat([left, right], -1).to(x.dtype)
    out[..., :half], out[..., half:] = left, right
    return out
