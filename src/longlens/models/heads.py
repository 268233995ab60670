"""Heads on top of an encoder: the vocabulary's logits, and the weights of ESM-2's contact regression."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longlens.lens.contacts import Regression


class MaskedLMHead(nn.Module):
    """Dense, gelu, LayerNorm, then the product with the embedding (tied) and a bias (RoBERTa; ESM-2)."""

    def __init__(self, width: int, vocabulary: int, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Logits (T, V) of x (T, d), for the embedding (V, d)."""
        return F.linear(self.norm(F.gelu(self.dense(x))), embedding, self.bias)


class ContactHead(nn.Module):
    """Logistic regression over all layers' and heads' symmetrised, corrected attention (Rao et al. 2020).

    Holds the weights, (1, layers x heads), layer-major; `longlens.lens.contacts` computes with them.
    """

    def __init__(self, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = layers
        self.regression = nn.Linear(layers * heads, 1)

    def weights(self) -> Regression:
        """The regression in the form that `longlens.lens.contacts` takes."""
        weight, bias = self.regression.weight.detach(), self.regression.bias.detach()
        return Regression(weight.float().cpu().view(self.layers, -1), float(bias))
