"""What the memory tests measure: the estimate of one target of a protein."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longlens.io.alphabet import ESM
from longlens.jobs.context_protein import ProteinContext
from longlens.jobs.context_regions import regular_spans
from longlens.models.encoder import EncoderConfig
from longlens.models.language_model import MaskedLM

CONFIG = EncoderConfig(vocabulary=33, layers=3, width=320, heads=4, feed_forward=1280)
SPANS = 64


def model() -> MaskedLM:
    return MaskedLM(CONFIG, ESM, contacts=False).eval().requires_grad_(False)


def estimate(length: int) -> Callable[[], object]:
    torch.set_num_threads(1)
    subject = ProteinContext(model(), "A" * length, budget=1)
    spans = regular_spans(range(1, length + 1), -(-length // SPANS))
    return lambda: subject.estimate([length // 2], spans)
