"""PyTorch's fused attention on a CPU: the operator behind `scaled_dot_product_attention`, called by its own name.

It is an online softmax over tiles (FlashAttention, Dao et al. 2022, arXiv:2205.14135) with sums in float32, and returns
the log-sum-exp too. Its name is private to PyTorch, so it is checked at first use.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from longlens.ops.inputs import wide_dtype


def attend_cpu(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The fused CPU operator: output (B, H, Nq, D), and log-sum-exp (B, H, Nq), float32 or float64, without gradient.

    Heads may be grouped. Widths must be equal and numbers within a row adjacent; `mask` is additive, in the query's
    dtype, and broadcasts; rows without keys give 0 and 0. Ask `cpu_serves` first.
    """
    # the operator scales the -inf of its causal mask too
    if causal and scale < 0:
        query, scale = -query, -scale
    elif causal and scale == 0:
        query, scale = torch.zeros_like(query), 1.0
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return output, lse


def attend_cpu_backward(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, given that of the output, and what `attend_cpu` returned with this mask.

    `mask` may be a view with any strides, in the query's dtype or float32. Ask `cpu_serves_masks` first.
    """
    d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_output, query, key, value, output, lse, 0.0, False, attn_mask=mask, scale=scale
    )
    return d_query, d_key, d_value


@cache
def cpu_serves(dtype: torch.dtype) -> bool:
    """Whether the fused CPU operator, whose name is private to PyTorch, exists and gives what we take it to give."""
    # two query heads to a key head, fewer queries than keys; no random numbers, which belong to the caller
    query = torch.linspace(-2.0, 2.0, 2 * 3 * 8).view(1, 2, 3, 8).to(dtype)
    key = torch.linspace(1.0, -3.0, 5 * 8).sin().view(1, 1, 5, 8).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            output, lse = attend_cpu(query, key, key, 0.5)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False
        scores = query.double() @ key.double().mT * 0.5
        weights = (scores - lse.double().unsqueeze(-1)).exp()
        right = (weights.sum(-1) - 1).abs().max() < 1e-3 and (output - weights @ key.double()).abs().max() < 5e-2
    return bool(right) and lse.dtype == wide_dtype(dtype)


@cache
def cpu_serves_masks(dtype: torch.dtype) -> bool:
    """Whether the fused CPU operator and its backward pass, for grouped heads and a wide mask of overlapping strides,
    give what we take them to give."""
    if not cpu_serves(dtype):
        return False
    query = torch.linspace(-2.0, 2.0, 2 * 3 * 8).view(1, 2, 3, 8).to(dtype)
    key = torch.linspace(1.0, -3.0, 5 * 8).sin().view(1, 1, 5, 8).to(dtype)
    mask = torch.linspace(-1.0, 2.0, 2 * 7, dtype=wide_dtype(dtype)).as_strided((1, 2, 3, 5), (0, 7, 1, 1))
    # the gradients by their formulas: a first use may be where autograd is off
    q, k = query.double(), key.double()
    weights = (q @ k.mT * 0.5 + mask).softmax(-1)
    d_weights = q @ k.mT
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    want = (0.5 * d_scores @ k, 0.5 * (d_scores.mT @ q).sum(1, keepdim=True), (weights.mT @ q).sum(1, keepdim=True))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            output, lse = attend_cpu(query, key, key, 0.5, mask=mask)
            grads = attend_cpu_backward(query, query, key, key, output, lse, 0.5, mask=mask)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False
        return all(bool((got - right).abs().max() < 5e-2) for got, right in zip(grads, want, strict=True))
