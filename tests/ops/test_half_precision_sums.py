"""bfloat16 and float16: sums in float32, so that no score is rounded before its exponential."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import longlens
from longlens.ops.inputs import check_inputs
from longlens.ops.tiles.dense import dense_tiles
from longlens.ops.tiles.index import size

N, D = 320, 16


def relative_errors(function, tensors, weights, want):
    """Of output and gradients against float64."""
    output = function(*tensors)
    output = output[0] if isinstance(output, tuple) else output
    results = [output.detach(), *torch.autograd.grad((output * weights.to(output.dtype)).sum(), tensors)]
    return [float((ours.double() - true).norm() / true.norm()) for ours, true in zip(results, want, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 7.0], ids=["small scores", "scores up to 40"])
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("exact", {}),
        ("exact", {"return_lse": True}),
        ("exact:blockwise", {}),
        (f"window:{N}", {}),
        (f"window:{N // 2}|dilated:{N},1", {"return_lse": True}),
    ],
    ids=["exact", "exact, lse", "tiles", "window", "union"],
)
def test_error_is_at_most_twice_that_of_pytorchs_fused_kernel(method, arguments, scale, dtype):
    query, key, value = (torch.randn(1, 2, N, D) for _ in range(3))
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (query * scale, key, value)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    weights = torch.randn(1, 2, N, D, dtype=torch.float64)
    scores = exact[0] @ exact[1].mT * D**-0.5
    output = torch.softmax(scores, -1) @ exact[2]
    want = [output.detach(), *torch.autograd.grad((output * weights).sum(), exact)]

    def ours(q, k, v):
        return longlens.attention(q, k, v, method=method, **arguments)

    theirs = relative_errors(F.scaled_dot_product_attention, tensors, weights, want)
    for mine, fused in zip(relative_errors(ours, tensors, weights, want), theirs, strict=True):
        assert mine <= 2 * fused
    _, lse = longlens.attention(*tensors, method=method, return_lse=True)
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1).detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", ["exact:blockwise", "lsh:2,64", "window:8|dilated:8,2"])
def test_float16_does_not_overflow_where_its_values_are_within_range(method):
    query, key, value = (torch.full((1, 1, 256, D), number, dtype=torch.float16) for number in (90.0, 90.0, 20.0))
    output, lse = longlens.attention(query, key, value, method=method, scale=1.0, return_lse=True)
    torch.testing.assert_close(output, value, rtol=1e-2, atol=0)
    assert lse.isfinite().all()


def test_causal_rows_meet_keys_in_few_lengths():
    """The matrix products of half precision keep a plan for every length of keys: 645 MiB for as many as there are
    blocks of rows in 65,536 tokens."""
    query = torch.empty(1, 1, 2**16, D, dtype=torch.bfloat16, device="meta")
    inputs = check_inputs(query, query, query, None, 0.0, True, None, None, None, None, False)
    lengths = {size(piece.keys) for tile in dense_tiles(inputs) for piece in tile.pieces}
    assert len(lengths) <= 8
