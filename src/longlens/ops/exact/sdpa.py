"""PyTorch's fused attention, only where its memory is linear.

`torch.nn.functional.scaled_dot_product_attention` (FlashAttention, Dao et al. 2022, arXiv:2205.14135) turns to an N x N
path for dropout on a CPU, for expanded masks and for value width != head width. `refusals` keeps such calls away; a value
width that differs is padded with zeros up to the larger of the two, which changes no score.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlens.ops.inputs import Inputs
from longlens.ops.method import Attended

LINEAR_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def refusals(inputs: Inputs) -> list[str]:
    """Why PyTorch's fused attention cannot serve these inputs in linear memory."""
    aligned = inputs.offset == 0
    wants = {
        "it gives no log-sum-exp": inputs.need_lse,
        "it would expand a mask rule to N x N": inputs.rule is not None,
        "it would expand a bias to N x N": inputs.bias is not None,
        "dropout is quadratic on this device": inputs.dropout > 0 and not inputs.query.is_cuda,
        "its causal mask is top-left aligned and Nq != Nk": inputs.causal and not aligned,
        "causal with a key mask would expand to N x N": inputs.causal and inputs.key_mask is not None,
    }
    return [reason for reason, refused in wants.items() if refused]


def attend(inputs: Inputs) -> Attended:
    """softmax(scale q k^T) v, causal or with a key mask, by PyTorch's fused kernels."""
    query, key, value, width = _padded(inputs.query, inputs.key, inputs.value)
    # (B, 1, 1, Nk) stays a row; expanded to Nq rows it would be quadratic
    mask = None if inputs.key_mask is None else inputs.key_mask[:, None, None, :]
    with sdpa_kernel(LINEAR_BACKENDS):
        output = F.scaled_dot_product_attention(
            query, key, value, mask, inputs.dropout, inputs.causal,
            scale=inputs.scale, enable_gqa=inputs.groups > 1,
        )  # fmt: skip
    return Attended(output[..., :width], None)


def _padded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Queries, keys and values of one width, and the value width to cut back to."""
    width = value.shape[3]
    short = query.shape[3] - width
    if short > 0:
        value = F.pad(value, (0, short))
    elif short < 0:
        query, key = F.pad(query, (0, -short)), F.pad(key, (0, -short))
    return query, key, value, width
