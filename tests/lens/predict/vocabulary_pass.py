"""Predictions over a large vocabulary, as the memory meter runs them in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longlens.lens.predict.vocabulary import Head, predictions


def predict(length: int, vocabulary: int, block: int | None = None) -> Callable[[], None]:
    """Surprise and top 5 of `length` vectors of width 16 over `vocabulary` tokens."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    hidden, weight = torch.randn(length, 16), torch.randn(vocabulary, 16)
    targets = torch.randint(vocabulary, (length,))

    def call() -> None:
        found = predictions(hidden, Head(weight), targets, block=block)
        assert bool(torch.isfinite(found.surprise).all())

    return call
