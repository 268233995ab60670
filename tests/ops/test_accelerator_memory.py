"""The tiles of a GPU on a CPU: what a backward pass holds at a time grows as the length does."""

from __future__ import annotations

import pytest
import torch

import longlens
from live_tensors import LiveTensors
from longlens.ops.sparse import pattern
from longlens.ops.tiles import backward
from longlens.ops.tiles.grid import TileShape


def peak(method, length, padding):
    tensors = [torch.randn(1, 1, length, 64).bfloat16().requires_grad_() for _ in range(3)]
    keep = (torch.arange(length) < length - length // 8).unsqueeze(0) if padding else None
    slope = torch.randn(1, 1, length, 64).bfloat16()
    with LiveTensors() as seen:
        torch.autograd.grad(longlens.attention(*tensors, method=method, key_mask=keep), tensors, slope)
    return seen.peak


@pytest.mark.parametrize(
    ("method", "padding"), [("global:(0,)", False), ("strided:128", False), ("strided:128", True), ("fixed:128", True)]
)
def test_a_backward_pass_is_linear(method, padding, monkeypatch):
    """Also where a row's keys become too many for one piece, from which on its log-sum-exp is kept."""
    monkeypatch.setattr(pattern, "sparse_shape", lambda inputs: TileShape(256, 2048, 2**24))
    monkeypatch.setattr(backward, "WHOLE", ())
    monkeypatch.setattr(backward, "AT_ONCE", 2**15)
    sizes = [peak(method, length, padding) for length in (2048, 4096, 8192)]
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[2] <= 2.1 * sizes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_some_rows_at_a_time(dtype, monkeypatch):
    left, right = torch.randn(2, 3, 101, 8).to(dtype)
    whole = backward.row_products(left, right)
    monkeypatch.setattr(backward, "WHOLE", ())
    monkeypatch.setattr(backward, "AT_ONCE", 3 * 8 * 10)
    torch.testing.assert_close(backward.row_products(left, right), whole)
    monkeypatch.setattr(backward, "AT_ONCE", 1)
    torch.testing.assert_close(backward.row_products(left, right), whole)
