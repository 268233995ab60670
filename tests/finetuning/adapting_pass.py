"""What the memory test measures: forward and backward of adapters on one protein."""

from __future__ import annotations

from collections.abc import Callable

import torch

import longlens
from longlens.finetuning.lora import Adapters
from longlens.io.alphabet import ESM
from longlens.jobs.inference import residue_vectors
from longlens.models.encoder import EncoderConfig
from longlens.models.families.esmc import esmc_config
from longlens.models.language_model import MaskedLM
from longlens.models.parts.feed_forward import FeedForward
from longlens.models.parts.norm import Norm
from longlens.models.parts.positions import RelativePositions
from longlens.models.parts.projections import Projections

# random weights: memory does not depend on them
CONFIGS = {
    "ESM-2": longlens.load("tiny").config,
    "ESM-C": esmc_config(64, 6, 256, 4, 768),
    "T5": EncoderConfig(
        33, 6, 128, 8, 512, norm=Norm("rms"), projections=Projections(bias=False, head_width=32, scale=1.0),
        feed=FeedForward("gelu_tanh", gated=True, bias=False), positions=RelativePositions(32, 128),
        token_dropout=False, head=None,
    ),
}  # fmt: skip


def adapting_pass(family: str, length: int) -> Callable[[], object]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MaskedLM(CONFIGS[family], ESM, contacts=False).eval().requires_grad_(False)
    adapters = Adapters.make(model, 8, 16, 0)

    def call() -> object:
        with adapters.trained():
            residue_vectors(model, ["MKTAYIAK" * (length // 8)])[0].square().mean().backward()
        return None

    return call
