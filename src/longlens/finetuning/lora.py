"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W + (alpha / r) B A, with W frozen, A random and B zero.

On the attention's projections of every layer. Queries, keys and values are one product in our encoder, so its update
has three parts of rank r, one for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longlens.models.language_model import MaskedLM

# names of a layer's projections, and how many maps each holds
PARTS = {"qkv": 3, "out": 1}


class LowRankLinear(nn.Linear):
    """A frozen linear layer, which it shares, and an update of low rank for each of its `parts` blocks of outputs."""

    def __init__(self, base: nn.Linear, parts: int, rank: int, alpha: float, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.parts, self.rank, self.factor = base, parts, rank, alpha / rank
        down = torch.randn(parts * rank, base.in_features, generator=generator) * base.in_features**-0.5
        self.down = nn.Parameter(down.to(base.weight.device))
        self.up = nn.Parameter(torch.zeros(parts, base.out_features // parts, rank, device=base.weight.device))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The frozen weight."""
        return self.base.weight

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """The frozen bias."""
        return self.base.bias

    def forward(self, input: Tensor) -> Tensor:
        low = F.linear(input, self.down.to(input.dtype)).unflatten(-1, (self.parts, self.rank))
        update = torch.einsum("...pr,por->...po", low, self.up.to(input.dtype)).flatten(-2)
        return self.base(input) + self.factor * update

    def merged(self) -> nn.Linear:
        """An ordinary layer with the update added to a copy of the weight."""
        update = self.factor * (self.up @ self.down.unflatten(0, (self.parts, self.rank))).flatten(0, 1)
        layer = nn.Linear(1, 1, bias=self.base.bias is not None, device="meta")
        layer.in_features, layer.out_features = self.in_features, self.out_features
        weight = (self.base.weight.detach().float() + update.detach().float()).to(self.base.weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = self.base.bias
        return layer


@dataclass
class Adapters:
    """The adapters of a model; `trained()` and `merged()` put them into the model for the time of a `with`."""

    model: MaskedLM
    layers: list[tuple[nn.Module, str, LowRankLinear]]

    @classmethod
    def make(cls, model: MaskedLM, rank: int, alpha: float, seed: int) -> Adapters:
        """Adapters that change nothing yet."""
        generator = torch.Generator().manual_seed(seed)
        return cls(model, [
            (layer, name, LowRankLinear(getattr(layer, name), parts, rank, alpha, generator))
            for layer in model.encoder.layers for name, parts in PARTS.items()
        ])  # fmt: skip

    def parameters(self) -> dict[str, nn.Parameter]:
        """All trained parameters by name."""
        return {
            f"{number}.{name}.{part}": getattr(adapter, part)
            for number, (_, name, adapter) in enumerate(self.layers) for part in ("down", "up")
        }  # fmt: skip

    @contextmanager
    def trained(self, *, recompute: bool = True) -> Iterator[None]:
        """The model with its adapters. `recompute`: its layers again in the backward pass, for a third more time,
        instead of keeping their activations; memory is linear in the tokens either way."""
        before = self.model.encoder.recompute
        self.model.encoder.recompute = recompute
        try:
            with self._inside([adapter for *_, adapter in self.layers]):
                yield
        finally:
            self.model.encoder.recompute = before

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The model with the updates added to copies of its weights: an ordinary model, to save or to run."""
        with self._inside([adapter.merged() for *_, adapter in self.layers]):
            yield

    @contextmanager
    def _inside(self, replacements: list[LowRankLinear] | list[nn.Linear]) -> Iterator[None]:
        for (layer, name, _), replacement in zip(self.layers, replacements, strict=True):
            setattr(layer, name, replacement)
        try:
            yield
        finally:
            for layer, name, adapter in self.layers:
                setattr(layer, name, adapter.base)
