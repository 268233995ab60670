"""Two heads of a large vocabulary compared, as the memory meter runs it in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longlens.lens.predict.divergence import divergence
from longlens.lens.predict.vocabulary import Head


def divergence_pass(tokens: int) -> Callable[[], None]:
    """Heads of 65,536 words of width 16."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    hidden, targets = torch.randn(tokens, 16), torch.zeros(tokens, dtype=torch.int64)
    heads = [Head(torch.randn(65_536, 16)) for _ in range(2)]

    def call() -> None:
        divergence(hidden, heads[0], hidden, heads[1], targets)

    return call
