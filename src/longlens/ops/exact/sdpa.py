"""PyTorch's fused attention, only where its memory is linear.

`torch.nn.functional.scaled_dot_product_attention` (FlashAttention, Dao et al. 2022, arXiv:2205.14135) turns to an N x N
path for dropout on a CPU, for expanded masks and for value width != head width. `refusals` keeps such calls away; a
value width that differs is padded with zeros up to the larger of the two, which changes no score.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlens.ops.inputs import Inputs
from longlens.ops.outputs import AttentionOutput

LINEAR_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def refusals(inputs: Inputs) -> list[str]:
    """Why PyTorch's fused attention cannot serve these inputs in linear memory."""
    aligned = inputs.offset == 0
    wants = {
        "it gives no log-sum-exp": inputs.need_lse,
        "it would expand a mask rule to N x N": inputs.rule is not None,
        "it would expand a bias to N x N": inputs.bias is not None,
        "it has no softcap": inputs.softcap is not None,
        "it has no sinks": inputs.sinks is not None,
        "dropout is quadratic on this device": inputs.dropout > 0 and inputs.device_type != "cuda",
        "its causal mask is top-left aligned and Nq != Nk": inputs.causal and not aligned,
        "causal with a key mask would expand to N x N": inputs.causal and inputs.key_mask is not None,
        "no fused CUDA kernel takes these inputs": inputs.query.is_cuda and not _cuda_serves(inputs),
    }
    return [reason for reason, refused in wants.items() if refused]


def _cuda_serves(inputs: Inputs) -> bool:
    query, key, value, _ = _padded(inputs.query, inputs.key, inputs.value)
    mask = None if inputs.key_mask is None else inputs.key_mask[:, None, None, :]
    asked = SDPAParams(query, key, value, mask, inputs.dropout, inputs.causal, inputs.groups > 1)
    return can_use_flash_attention(asked) or can_use_efficient_attention(asked) or can_use_cudnn_attention(asked)


def attend(inputs: Inputs) -> AttentionOutput:
    """softmax(scale q k^T) v, causal or with a key mask, by PyTorch's fused kernels."""
    query, key, value, width = _padded(inputs.query, inputs.key, inputs.value)
    mask = filled = None
    if inputs.key_mask is not None:
        # a row without keys attends to all of them and is zeroed afterwards: the kernels differ in what they make of it
        filled = inputs.key_mask.any(1, keepdim=True)
        # (B, 1, 1, Nk) stays a row; expanded to Nq rows it would be quadratic
        mask = (inputs.key_mask | ~filled)[:, None, None, :]
    with sdpa_kernel(LINEAR_BACKENDS):
        output = F.scaled_dot_product_attention(
            query, key, value, mask, inputs.dropout, inputs.causal,
            scale=inputs.scale, enable_gqa=inputs.groups > 1,
        )  # fmt: skip
    output = output[..., :width]
    if filled is not None and not (filled.device.type == "cpu" and bool(filled.all())):
        output = torch.where(filled[:, :, None, None], output, output.new_zeros(()))
    return AttentionOutput(output, None)


def _padded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Queries, keys and values of one width, and the value width to cut back to."""
    width = value.shape[3]
    short = query.shape[3] - width
    if short > 0:
        value = F.pad(value, (0, short))
    elif short < 0:
        query, key = F.pad(query, (0, -short)), F.pad(key, (0, -short))
    # the kernels read rows of adjacent numbers
    query, key, value = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value))
    return query, key, value, width
