"""What the memory test of expanded biases measures: a backward pass with an N x N bias of a single number."""

from __future__ import annotations

from collections.abc import Callable

import torch

import longlens


def attend(length: int) -> Callable[[], object]:
    """Query, key and value need gradients; the bias, expanded without memory of its own, does not."""
    tensors = [torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3)]
    bias = torch.zeros(1, 1, 1, 1).expand(1, 1, length, length)

    def call() -> None:
        query, key, value = tensors
        longlens.attention(query, key, value, bias=bias).sum().backward()

    return call
