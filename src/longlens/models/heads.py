"""The weights of ESM-2's contact regression."""

from __future__ import annotations

from torch import nn

from longlens.lens.contacts import Regression


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
