"""What the memory test of T5 encoders measures: one pass over a long protein."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longlens.models.config import EncoderConfig
from longlens.models.encoder import Encoder, Packed
from longlens.models.parts.feed_forward import FeedForward
from longlens.models.parts.norm import Norm
from longlens.models.parts.positions import RelativePositions
from longlens.models.parts.projections import Projections

# heads together twice as wide as the stream, as ProtT5's are wider
CONFIG = EncoderConfig(
    128, 2, 64, 4, 128, norm=Norm("rms", 1e-6), projections=Projections(bias=False, head_width=32, scale=1.0),
    feed=FeedForward("relu", bias=False), positions=RelativePositions(), token_dropout=False, head=None,
)  # fmt: skip


def encode(length: int) -> Callable[[], object]:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG).eval().requires_grad_(False)
    packed = Packed(torch.arange(length) % 20 + 3, torch.tensor([0, length], dtype=torch.int32))

    def call() -> object:
        with torch.inference_mode():
            return encoder(packed).last

    return call
