"""Packed sequences by one launch on CUDA: PyTorch's kernels for sequences of different lengths.

Half precision goes to FlashAttention's (Dao 2023, arXiv:2307.08691; `torch.nn.attention.varlen`), float32 to the
memory-efficient one. A call of any other kind runs one sequence after the other. A sequence gives the same bits in
every pack that these kernels serve; by itself, outside a pack, another kernel serves it, and it gives the same up to
rounding.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from longlens.ops import fused_cuda
from longlens.ops.exact import sdpa
from longlens.ops.inputs import Inputs, all_finite
from longlens.ops.outputs import AttentionOutput

# the memory-efficient kernel's log-sum-exp has as many rows for each sequence as the longest has: at most so many times
# the tokens
SPREAD = 4


def kernel_for(inputs: Inputs) -> str | None:
    """The kernel that serves the whole pack, or None where the sequences have to run one by one."""
    if inputs.device_type != "cuda" or inputs.cu_seqlens is None or len(inputs.query) != 1:
        return None
    others = (inputs.rule, inputs.key_mask, inputs.bias, inputs.softcap, inputs.sinks)
    lengths = _lengths(inputs)
    if any(other is not None for other in others) or inputs.dropout or inputs.offset or min(lengths) == 0:
        return None
    if inputs.need_lse and inputs.needs_grad:
        # no gradient flows through their log-sum-exp
        return None
    width = max(inputs.query.shape[3], inputs.value.shape[3])
    if inputs.query.element_size() == 2:
        kernel = "flash" if width <= fused_cuda.WIDEST else None
    else:
        spread = len(lengths) * max(lengths) <= SPREAD * inputs.queries or not (inputs.need_lse or inputs.needs_grad)
        kernel = "efficient" if inputs.query.dtype == torch.float32 and inputs.groups == 1 and spread else None
    there = inputs.query
    # of shapes alone nothing can be tried
    usable = kernel is not None and (not there.is_cuda or fused_cuda.packs(kernel, there.dtype, there.device))
    return kernel if usable else None


def attend(inputs: Inputs) -> AttentionOutput | None:
    """Output and log-sum-exp of the whole pack, or None where the sequences have to run one by one."""
    kernel = kernel_for(inputs)
    if kernel is None:
        return None
    if inputs.causal and not bool(all_finite(inputs.key) & all_finite(inputs.value)):
        # 0 x NaN is NaN: what lies behind the causal mask has to be kept from the rows before it
        return None
    assert inputs.cu_seqlens is not None
    query, key, value, width = sdpa.padded(*sdpa.once_differentiable(inputs))
    bounds = inputs.boundaries
    if bounds is None:
        bounds = torch.tensor(inputs.cu_seqlens)
    tokens = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    output, lse = fused_cuda.attend_packed(
        kernel, tokens[0], tokens[1], tokens[2], bounds.to(query.device, torch.int32).contiguous(),
        max(_lengths(inputs)), inputs.scale, causal=inputs.causal, need_lse=inputs.need_lse,
    )  # fmt: skip
    return AttentionOutput(_heads_first(output)[..., :width], None if lse is None else lse.unsqueeze(0).contiguous())


def _heads_first(output: Tensor) -> Tensor:
    """(T, H, D) -> (1, H, T, D), a view: token-major, as models go on with it."""
    return output.transpose(0, 1).unsqueeze(0)


def _lengths(inputs: Inputs) -> list[int]:
    return [stop - start for start, stop in pairwise(inputs.cu_seqlens or ())]
