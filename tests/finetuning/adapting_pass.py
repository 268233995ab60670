"""What the memory test measures: forward and backward of adapters on one protein."""

from __future__ import annotations

from collections.abc import Callable

import torch

import longlens
from longlens.finetuning.lora import Adapters
from longlens.jobs.inference import residue_vectors


def adapting_pass(length: int) -> Callable[[], object]:
    torch.set_num_threads(1)
    model = longlens.load("tiny")
    adapters = Adapters.make(model, 8, 16, 0)

    def call() -> object:
        with adapters.trained():
            residue_vectors(model, ["MKTAYIAK" * (length // 8)])[0].square().mean().backward()
        return None

    return call
