"""What the memory tests of biases measure: a call with a learned table of T5's buckets, and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch

import longlens


def attend(
    length: int, backward: bool = False, causal: bool = False, masked: bool = False, dtype: str = "float32"
) -> Callable[[], object]:
    """One call on (1, 2, length, 32) by the path that `longlens.attention` chooses."""
    kind = getattr(torch, dtype)
    tensors = [torch.randn(1, 2, length, 32, dtype=kind, requires_grad=backward) for _ in range(3)]
    table = torch.randn(2, 32, requires_grad=backward)
    keep = torch.arange(length).unsqueeze(0) % 7 > 0 if masked else None
    weight = torch.ones(1, 2, length, 32, dtype=kind)

    def call() -> object:
        with torch.set_grad_enabled(backward):
            bias = longlens.RelativePosition(table, "t5")
            output = longlens.attention(*tensors, bias=bias, is_causal=causal, key_mask=keep)
            return torch.autograd.grad(output, [*tensors, table], weight) if backward else output

    return call
