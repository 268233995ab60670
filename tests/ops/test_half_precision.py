"""Half precision: at most twice the error of PyTorch's fused kernel, which computes scores and softmax in float32."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import longlens as ll

HALVES = [torch.bfloat16, torch.float16]


def draw(dtype, size, length=320, width=32):
    tensors = [torch.randn(1, 4, length, width) for _ in range(3)]
    tensors[0] *= size
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def error(found, exact):
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("dtype", HALVES)
# scores of up to 5, and up to 40
@pytest.mark.parametrize("size", [1.0, 8.0])
@pytest.mark.parametrize("method", ["exact", "exact:blockwise", "window:400", "bigbird:64,5", "dilated:400,1"])
def test_output_and_gradients(method, size, dtype):
    tensors = draw(dtype, size)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    weight = torch.randn(1, 4, 320, 32).to(dtype)
    expected = F.scaled_dot_product_attention(*wide)
    exact = [expected, *torch.autograd.grad(expected, wide, weight.double())]

    def errors(output):
        found = [output, *torch.autograd.grad(output, tensors, weight)]
        return [error(one, other) for one, other in zip(found, exact, strict=True)]

    fused, ours = errors(F.scaled_dot_product_attention(*tensors)), errors(ll.attention(*tensors, method=method))
    assert all(one <= 2 * other for one, other in zip(ours, fused, strict=True)), (ours, fused)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [16, 24, 32, 40])
def test_widths(width, dtype):
    tensors = draw(dtype, 6.0, 260, width)
    expected = F.scaled_dot_product_attention(*(tensor.double() for tensor in tensors))
    fused = error(F.scaled_dot_product_attention(*tensors), expected)
    for method in ("exact:blockwise", "window:300"):
        assert error(ll.attention(*tensors, method=method), expected) <= 2 * fused


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", ["exact", "window:400", "window:200|dilated:200,2"])
def test_log_sum_exp_is_that_of_float32(method, dtype):
    query, key, value = draw(dtype, 8.0)
    _, lse = ll.attention(query, key, value, method=method, return_lse=True)
    _, expected = ll.attention(query.double(), key.double(), value.double(), method=method, return_lse=True)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "length"),
    [
        ("exact", 4096),
        ("window:4096", 4096),
        ("bigbird:64,5", 4096),
        ("window:2048|dilated:2048,2", 4096),
        ("window:4096|lsh:1,64", 4096),
        ("lsh:1,4096,buckets=2", 8192),
        ("window:64|lsh:1,4096,buckets=2", 8192),
    ],
)
def test_float16_does_not_overflow(method, length):
    """Values near 20 under nearly equal weights: a sum of 4,096 of them does not fit float16, their mean does."""
    query, key, value = (torch.randn(1, 1, length, 16) for _ in range(3))
    tensors = [tensor.half() for tensor in (query * 0.01, key, value + 20)]
    output, lse = ll.attention(*tensors, method=method, return_lse=True)
    assert output.isfinite().all()
    assert lse.isfinite().all()
    expected = ll.attention(*(tensor.double() for tensor in tensors), method=method)
    assert error(output, expected) < 2e-3


@pytest.mark.parametrize("method", ["longformer:3,global_tokens=(0,)", "dilated:5", "exact:path=blockwise"])
def test_rows_whose_sum_of_exponentials_overflows_float32(method):
    """Log-sum-exp a little above 88.7, the logarithm of the largest float32, with values whose products stay finite."""
    torch.manual_seed(0)
    # all scores of query 40 are 88: several of them overflow together
    query, key, value = torch.zeros(1, 1, 128, 16), torch.ones(1, 1, 128, 16), 0.1 * torch.randn(1, 1, 128, 16)
    query[0, 0, 40] = 5.5
    tensors = [tensor.to(torch.bfloat16) for tensor in (query, key, value)]
    got = ll.attention(*tensors, scale=1.0, method=method)
    want = ll.attention(*(tensor.double() for tensor in tensors), scale=1.0, method=method)
    assert error(got[:, :, 40], want[:, :, 40]) < 0.02
