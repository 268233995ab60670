"""Compare a call of the door with its method's definition in float64, forward and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import longlens
from longlens.ops.inputs import check_inputs
from longlens.ops.method import Method
from longlens.ops.reference import softmax_attention
from longlens.ops.registry import resolve_method

# float64 sums of a few hundred terms
TOLERANCE = 1e-11


def make(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, value_width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random float64 query, key and value that want gradients."""
    shapes = [
        (batch, heads, queries, width),
        (batch, kv_heads, keys, width),
        (batch, kv_heads, keys, value_width or width),
    ]
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return query, key, value


def check(method: Method | str, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """Assert that output and gradients equal the definition's, with and without log-sum-exp; returns the output."""
    inputs = check_inputs(
        query, key, value, arguments.get("attn_mask"), 0.0, arguments.get("is_causal", False), arguments.get("scale"),
        arguments.get("key_mask"), None, arguments.get("bias"), False,
    )  # fmt: skip
    expected = resolve_method(method).reference(inputs)
    bias = arguments.get("bias")
    learned = [bias] if isinstance(bias, Tensor) else list(bias.parameters()) if bias is not None else []
    wanted = [tensor for tensor in (query, key, value, *learned) if tensor.requires_grad]
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), wanted)
    for return_lse in (False, True):
        output = longlens.attention(query, key, value, method=method, return_lse=return_lse, **arguments)
        output = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
        grads = torch.autograd.grad((output * weights).sum(), wanted)
        for grad, want in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, want, rtol=TOLERANCE, atol=TOLERANCE * 10)
    return output


def check_lse(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> None:
    """Assert that the exact method's log-sum-exp and its gradient equal the definition's."""
    inputs = check_inputs(
        query, key, value, arguments.get("attn_mask"), 0.0, arguments.get("is_causal", False), None,
        arguments.get("key_mask"), None, arguments.get("bias"), True,
    )  # fmt: skip
    _, expected = softmax_attention(inputs)
    _, lse = longlens.attention(query, key, value, return_lse=True, **arguments)
    torch.testing.assert_close(lse, expected, rtol=TOLERANCE, atol=TOLERANCE)
    weights = torch.randn_like(expected).masked_fill(expected == -torch.inf, 0.0)
    got = torch.autograd.grad((lse.masked_fill(lse == -torch.inf, 0.0) * weights).sum(), (query, key))
    want = torch.autograd.grad((expected.masked_fill(expected == -torch.inf, 0.0) * weights).sum(), (query, key))
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)
