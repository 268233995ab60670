"""What the parity tests of all families share: random weights, ragged proteins, and differences layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from longlens.models import pretrained
from longlens.models.checkpoints.build import build
from longlens.models.encoder import Packed
from longlens.models.language_model import MaskedLM

PROTEINS = (
    "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQ",
    "GAVLI",
    "MXWBUZOACDEFGHIKLMNPQRSTVWY",
)


def randomise(model: nn.Module, deviation: float = 0.3, seed: int = 0) -> None:
    """Weights large enough for every part to matter: matrices N(0, deviation), norms about 1, biases about 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(deviation * noise if parameter.ndim > 1 else 0.1 * noise + gain)


def load_float64(path: Path) -> MaskedLM:
    """`longlens.load` in float64."""
    return build(pretrained._read(path), torch.float64, torch.device("cpu"))


def differences(
    ours: MaskedLM, packed: Packed, theirs: Callable[[Tensor], Sequence[Tensor]], layers: Sequence[int] | None = None
) -> list[float]:
    """The largest relative difference of each layer (0..L, then the logits) from `theirs`, a function of the tokens
    (n,) of one protein alone: |ours - theirs| / |theirs|, norms over a protein."""
    layers = range(ours.config.layers + 1) if layers is None else layers
    found: list[list[float]] = []
    with torch.inference_mode():
        encoded = ours(packed, keep=layers)
        streams = [encoded.layers[layer] for layer in layers]
        streams += [ours.logits(encoded.last)] if ours.predicts else []
        bounds = packed.cu_seqlens.tolist()
        for start, stop in pairwise(bounds):
            wanted = theirs(packed.tokens[start:stop])
            assert len(wanted) == len(streams)
            found.append([
                float((mine[start:stop].double() - there.double()).norm() / there.double().norm())
                for mine, there in zip(streams, wanted, strict=True)
            ])  # fmt: skip
    return [max(of_layer) for of_layer in zip(*found, strict=True)]


def of_transformers(model: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    """Hidden states and logits of a language model of transformers for one protein."""

    def states(tokens: Tensor) -> list[Tensor]:
        one = tokens.unsqueeze(0)
        out = model(one, attention_mask=torch.ones_like(one), output_hidden_states=True)
        return [*(state[0] for state in out.hidden_states), out.logits[0]]

    return states
