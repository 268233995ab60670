"""A decoder with a very wide feed-forward part, as the memory meter runs it in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import tiny_models as tiny
import torch

from longlens.hf import attach


def wide_pass(length: int, chunk: int | None) -> Callable[[], None]:
    """One layer of width 32, feed-forward 64 times as wide, over `length` tokens."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = tiny.gpt2(n_inner=64 * 32, n_layer=1, n_positions=length).eval()
    ids = tiny.tokens(1, length)
    attach(model, mlp_chunk=chunk)

    def call() -> None:
        with torch.no_grad():
            model.transformer(input_ids=ids, use_cache=False)

    return call
