"""Normalisation of vectors: LayerNorm (Ba et al. 2016, arXiv:1607.06450) or RMSNorm (Zhang & Sennrich 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from longlens.errors import InputError


@dataclass(frozen=True)
class Norm:
    """`kind` "layer" or "rms" (arXiv:1910.07467, which has no bias); each has a weight, LayerNorm a bias too unless
    `bias` is False."""

    kind: str = "layer"
    eps: float = 1e-5
    bias: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("layer", "rms"):
            raise InputError(f"expected a norm 'layer' or 'rms', got {self.kind!r}")

    @property
    def has_bias(self) -> bool:
        return self.bias and self.kind == "layer"

    def make(self, width: int) -> nn.Module:
        """The module for vectors (..., width)."""
        if self.kind == "rms":
            return nn.RMSNorm(width, eps=self.eps)
        return nn.LayerNorm(width, eps=self.eps, bias=self.bias)

    def count(self, width: int) -> int:
        """The number of parameters."""
        return width * (1 + self.has_bias)
