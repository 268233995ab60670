"""The head of a masked language model: the vocabulary's logits of each token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longlens.models.parts.norm import Norm


@dataclass(frozen=True)
class Head:
    """A product with a matrix (V, d) and a bias; before it, where `dense`, a linear layer, GELU and a norm (RoBERTa).

    `tied`: the matrix is the embedding's.
    """

    dense: bool = True
    tied: bool = True
    bias: bool = True
    norm: Norm = field(default_factory=Norm)

    def count(self, width: int, vocabulary: int) -> int:
        """The number of parameters, without the embedding."""
        dense = width * (width + 1) + self.norm.count(width) if self.dense else 0
        return dense + vocabulary * self.bias + (0 if self.tied else vocabulary * width)


class MaskedLMHead(nn.Module):
    """The modules of a `Head`."""

    def __init__(self, head: Head, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width) if head.dense else None
        self.norm = head.norm.make(width) if head.dense else None
        self.decoder = None if head.tied else nn.Linear(width, vocabulary, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if head.bias else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Logits (T, V) of x (T, d), for the embedding (V, d)."""
        if self.dense is not None and self.norm is not None:
            x = self.norm(F.gelu(self.dense(x)))
        return F.linear(x, embedding if self.decoder is None else self.decoder.weight, self.bias)
