"""What the memory tests measure: one forward pass over packed proteins."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longlens.io.alphabet import ESM
from longlens.models.encoder import EncoderConfig
from longlens.models.language_model import MaskedLM

CONFIG = EncoderConfig(vocabulary=33, layers=3, width=320, heads=20, feed_forward=1280)


def packed_pass(lengths: list[int]) -> Callable[[], object]:
    torch.set_num_threads(1)
    model = MaskedLM(CONFIG, ESM).eval().requires_grad_(False)
    packed = model.pack(["A" * length for length in lengths])

    def call() -> object:
        with torch.inference_mode():
            return model(packed).last

    return call
