"""PyTorch's fused attention, only where its memory is linear, and chosen without touching any setting of PyTorch.

`torch.nn.functional.scaled_dot_product_attention` (FlashAttention, Dao et al. 2022, arXiv:2205.14135) turns to an N x N
path for dropout on a CPU, for expanded masks and for value width != head width. `refusals` keeps such calls away; a
value width that differs is padded with zeros up to the larger of the two, which changes no score.

Which kernel `scaled_dot_product_attention` picks can be steered by `torch.nn.attention.sdpa_kernel` alone, which sets
flags of the whole process: two threads that use it restore each other's values, and other code's calls fail meanwhile.
So on a CPU the operator behind it is called directly, which also gives the log-sum-exp, and on CUDA PyTorch is asked
beforehand which kernel it would pick; where the log-sum-exp is wanted, that kernel's own operator is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longlens.errors import UnsupportedError
from longlens.ops import fused_cuda
from longlens.ops.fused_cpu import attend_cpu, cpu_serves
from longlens.ops.inputs import Inputs, all_finite
from longlens.ops.outputs import AttentionOutput


def refusals(inputs: Inputs) -> list[str]:
    """Why PyTorch's fused attention cannot serve these inputs in linear memory."""
    aligned = inputs.offset == 0
    on_cpu = inputs.device_type == "cpu"
    wants = {
        "no gradient flows through its log-sum-exp": inputs.need_lse and inputs.needs_grad,
        "its log-sum-exp is that before dropout": inputs.need_lse and inputs.dropout > 0,
        "it would expand a mask rule to N x N": inputs.rule is not None,
        "it would expand a bias to N x N": inputs.bias is not None,
        "it has no softcap": inputs.softcap is not None,
        "it has no sinks": inputs.sinks is not None,
        "dropout is quadratic on this device": inputs.dropout > 0 and inputs.device_type != "cuda",
        "its causal mask is top-left aligned and Nq != Nk": inputs.causal and not aligned,
        "causal with a key mask would expand to N x N": inputs.causal and inputs.key_mask is not None,
        "this PyTorch has no fused CPU operator that passes our check": on_cpu and not cpu_serves(inputs.query.dtype),
        "no kernel of linear memory is known on this device": inputs.device_type not in ("cpu", "cuda"),
        "PyTorch would pick a kernel of quadratic memory": inputs.query.is_cuda and _cuda_kernel(inputs) is None,
        "the kernel that PyTorch would pick gives no log-sum-exp": (
            inputs.need_lse and inputs.query.is_cuda and _lse_kernel(inputs) is None
        ),
    }
    return [reason for reason, refused in wants.items() if refused]


def attend(inputs: Inputs) -> AttentionOutput:
    """softmax(scale q k^T) v, causal or with a key mask, by PyTorch's fused kernels; also the log-sum-exp."""
    query, key, value, width = padded(*once_differentiable(inputs))
    mask = filled = None
    if inputs.key_mask is not None:
        # a row without keys attends to all of them and is zeroed afterwards: the kernels differ in what they make of it
        filled = inputs.key_mask.any(1, keepdim=True)
        # (B, 1, 1, Nk) stays a row; expanded to Nq rows it would be quadratic
        mask = (inputs.key_mask | ~filled)[:, None, None, :]
    lse = None
    if inputs.device_type == "cpu":
        if mask is not None:
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        output, lse = attend_cpu(query, key, value, inputs.scale, causal=inputs.causal, mask=mask)
        output, lse = _pass_on_nan(inputs.query, output, lse)
    elif inputs.need_lse:
        kernel = _lse_kernel(inputs)
        assert kernel is not None
        output, lse = fused_cuda.attend_dense(
            kernel, query, key, value, inputs.scale, causal=inputs.causal, mask=mask
        )  # fmt: skip
    else:
        output = F.scaled_dot_product_attention(
            query, key, value, mask, inputs.dropout, inputs.causal,
            scale=inputs.scale, enable_gqa=inputs.groups > 1,
        )  # fmt: skip
    output = output[..., :width]
    if filled is not None and not (filled.device.type == "cpu" and bool(filled.all())):
        output = torch.where(filled[:, :, None, None], output, output.new_zeros(()))
        lse = None if lse is None else lse.masked_fill(~filled[:, :, None], -torch.inf)
    return AttentionOutput(output, lse.contiguous() if inputs.need_lse and lse is not None else None)


def scratch_elements(inputs: Inputs) -> int:
    """What padding to one width holds, in elements of the inputs' dtype."""
    width = max(inputs.query.shape[3], inputs.value.shape[3])
    rows = [tensor.numel() // tensor.shape[3] for tensor in (inputs.query, inputs.key, inputs.value, inputs.query)]
    short = width - inputs.value.shape[3]
    if short > 0:
        return width * (rows[2] + rows[3])
    return width * (rows[0] + rows[1]) if width > inputs.query.shape[3] else 0


def _pass_on_nan(query: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The operator takes a row of NaN scores for a row without keys and gives it 0: here it stays NaN."""
    if bool(all_finite(query)):
        return output, lse
    lost = ~query.detach().isfinite().all(3)
    return output.masked_fill(lost.unsqueeze(3), torch.nan), lse.masked_fill(lost, torch.nan)


def once_differentiable(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, whose gradients refuse by our own message to be differentiated again."""
    tensors = (inputs.query, inputs.key, inputs.value)
    return _Once.apply(*tensors) if inputs.needs_grad else tensors


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _Refusal.apply(*grads)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *grads: Tensor | None) -> Any:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(
            "second derivatives are not supported by the fused kernel; use method='exact:path=math' (quadratic memory) "
            "or an approximator such as 'linear', whose gradients are differentiable"
        )


def _cuda_kernel(inputs: Inputs) -> str | None:
    """The kernel that PyTorch would pick: "flash", "efficient" or "cudnn"; None for one of quadratic memory."""
    query, key, value, _ = padded(inputs.query, inputs.key, inputs.value)
    mask = None if inputs.key_mask is None else inputs.key_mask[:, None, None, :]
    choice = torch._fused_sdp_choice(
        query, key, value, mask, inputs.dropout, inputs.causal, scale=inputs.scale, enable_gqa=inputs.groups > 1
    )
    return fused_cuda.KERNELS.get(choice)


def _lse_kernel(inputs: Inputs) -> str | None:
    """The kernel whose log-sum-exp is taken on CUDA: the one that PyTorch would pick, or another of its kind."""
    kernel = _cuda_kernel(inputs)
    if kernel is None:
        return None
    if inputs.key_mask is not None:
        # the others take no mask by their own name, and this one no grouped heads
        kernels = ["efficient"] if inputs.groups == 1 else []
    else:
        kernels = [kernel, "flash"] if kernel == "cudnn" else [kernel]
    there = inputs.query
    return next((name for name in kernels if fused_cuda.gives_lse(name, there.dtype, there.device)), None)


def padded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
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
