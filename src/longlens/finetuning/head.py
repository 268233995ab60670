"""The head: a linear map that begins as the probe, a small network beside it that begins at zero, and a pooling.

So training begins at the probe's predictions and keeps the best step, and low-rank adaptation begins at the head's
(probing first, then fine-tuning, distorts pretrained features less: Kumar et al. 2022, arXiv:2202.10054).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from longlens.finetuning.probe import Linear
from longlens.finetuning.targets import Targets

DROPOUT = 0.1


class Head(nn.Module):
    """Vectors (R, d) of proteins or residues to outputs (R, C): logits, or values scaled by `centre` and `spread`."""

    mean: Tensor
    scale: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, width: int, outputs: int, hidden: int) -> None:
        super().__init__()
        for name, value in (("mean", torch.zeros(width)), ("scale", torch.ones(width)), ("centre", torch.zeros(1)),
                            ("spread", torch.ones(1))):  # fmt: skip
            self.register_buffer(name, value)
        self.linear = nn.Linear(width, outputs)
        self.wide = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, outputs)
        # 0: the mean over residues
        self.query = nn.Parameter(torch.zeros(width))

    def begin(self, probe: Linear, generator: torch.Generator) -> None:
        """Start at the probe, with random inner weights."""
        with torch.no_grad():
            for name, value in (("mean", probe.mean), ("scale", probe.scale), ("centre", [probe.centre]),
                                ("spread", [probe.spread])):  # fmt: skip
                getattr(self, name).copy_(torch.as_tensor(np.asarray(value)))
            self.linear.weight.copy_(torch.as_tensor(probe.weight))
            self.linear.bias.copy_(torch.as_tensor(probe.bias))
            width = self.wide.weight.shape[1]
            self.wide.weight.copy_(torch.randn(self.wide.weight.shape, generator=generator) * width**-0.5)
            for zero in (self.wide.bias, self.narrow.weight, self.narrow.bias, self.query):
                zero.zero_()

    def forward(self, vectors: Tensor) -> Tensor:
        """(R, d) -> (R, C)."""
        x = (vectors.float() - self.mean) / self.scale
        inner = F.dropout(F.gelu(self.wide(x)), DROPOUT, self.training)
        return self.linear(x) + self.narrow(inner)

    def pool(self, residues: list[Tensor]) -> Tensor:
        """(P, d): the weighted mean of each protein's residue vectors (L, d); weights by softmax of `query`."""
        pooled = []
        for vectors in residues:
            x = vectors.float()
            weights = torch.softmax(((x - self.mean) / self.scale) @ self.query, 0)
            pooled.append(weights @ x)
        return torch.stack(pooled)

    def losses(self, outputs: list[Tensor], truth: list[Tensor], targets: Targets, weights: Tensor) -> Tensor:
        """(P,): each protein's loss, the mean over its known targets of cross entropy times the class's weight, or of
        the squared error in units of `spread`. `truth` has NaN where no target is known; a protein without any has 0.
        """
        means = []
        for out, true in zip(outputs, truth, strict=True):
            known = ~true.isnan()
            if not known.any():
                means.append(out.sum() * 0.0)
            elif targets.task.classes:
                numbers = true[known].long()
                means.append((F.cross_entropy(out[known].float(), numbers, reduction="none") * weights[numbers]).mean())
            else:
                means.append(((out[known, 0].float() - (true[known].float() - self.centre) / self.spread) ** 2).mean())
        return torch.stack(means)


def readable(head: Head, vectors: Tensor, targets: Targets) -> NDArray[np.float64]:
    """Probabilities (R, C) or values (R, 1) of vectors (R, d)."""
    outputs = head(vectors.to(head.mean.device)).float()
    if targets.task.classes:
        return torch.softmax(outputs, -1).cpu().double().numpy()
    return (outputs * head.spread + head.centre).cpu().double().numpy()


def head_outputs(head: Head, residues: list[Tensor], targets: Targets) -> list[NDArray[np.float64]]:
    """`readable` for each protein from its residue vectors (L, d): (L, C), or (1, C) of a whole protein."""
    if not targets.task.by_residue:
        return [readable(head, vector, targets) for vector in head.pool(residues).split(1)]
    return [readable(head, vectors, targets) for vectors in residues]
