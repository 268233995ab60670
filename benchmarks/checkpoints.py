"""Random-weight ESM-2 models of the published sizes: made here once for the benchmarks that measure speed and memory.

The only module of the benchmarks that knows the classes of `longlens.models`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from longlens.io.alphabet import ESM
from longlens.models.encoder import EncoderConfig
from longlens.models.language_model import MaskedLM

# layers, width, heads; "dry" is for tests
SHAPES = {
    "dry": (2, 32, 4),
    "8M": (6, 320, 20),
    "35M": (12, 480, 20),
    "150M": (30, 640, 20),
    "650M": (33, 1280, 20),
}


def shape_of(name: str) -> EncoderConfig:
    """The configuration of an ESM-2 by its size."""
    layers, width, heads = SHAPES[name]
    return EncoderConfig(len(ESM), layers, width, heads, 4 * width, mask_token=ESM.mask)


def untrained(name: str) -> MaskedLM:
    """A model with a contact head and random weights, the same each time."""
    config = shape_of(name)
    torch.manual_seed(0)
    model = MaskedLM(config, ESM)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.2 * config.width**-0.5)
        assert model.contact_head is not None
        model.contact_head.regression.weight.normal_(0, 1.0)
        model.contact_head.regression.bias.fill_(-2.0)
    return model.eval().requires_grad_(False)


def make_model(name: str, folder: Path) -> Path:
    """`untrained(name)` as a checkpoint in the hub's format under `folder`.

    Beside it lies "esm-cpp.safetensors", which has the rotary frequencies in every layer, as the oldest checkpoints do
    and esm-cpp wants.
    """
    # here, since `untrained` is also used where there is no safetensors
    from safetensors.torch import load_file, save_file

    from longlens.models.pretrained import save

    place = folder / name
    save(untrained(name), place)
    tensors = load_file(place / "model.safetensors")
    frequencies = tensors.pop("esm.rotary_embeddings.inv_freq")
    key = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
    tensors |= {key.format(layer): frequencies.clone() for layer in range(SHAPES[name][0])}
    save_file(tensors, place / "esm-cpp.safetensors")
    return place


def operations(config: EncoderConfig, lengths: list[int]) -> float:
    """Multiplications and additions of one pass over each protein: matrix products, and attention over all pairs."""
    per_token = 2 * config.layers * (4 * config.width**2 + 2 * config.width * config.feed_forward)
    return float(sum((n + 2) * per_token + 4 * config.layers * config.width * (n + 2) ** 2 for n in lengths))
