"""An attention call that is not compiled: check, refuse or choose, call, join."""

from __future__ import annotations

import torch
from torch import Tensor

from longlens.ops.biases import Bias
from longlens.ops.choose import refuse_unless_able
from longlens.ops.inputs import Inputs, check_inputs, wide_dtype
from longlens.ops.masks import Rule
from longlens.ops.method import Method
from longlens.ops.nonfinite import attend_guarded
from longlens.ops.outputs import AttentionOutput
from longlens.ops.registry import resolve_method
from longlens.shapes import CuSeqlens, Key, KeyMask, LogSumExp, Output, Query, Value


def run_attention(
    query: Query,
    key: Key,
    value: Value,
    attn_mask: Rule | Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    *,
    method: Method | str,
    key_mask: KeyMask | None,
    cu_seqlens: CuSeqlens | None,
    bias: Bias | Tensor | None,
    return_lse: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> Output | tuple[Output, LogSumExp]:
    """What `longlens.attention` computes; arguments, results and errors are its own."""
    inputs = check_inputs(
        query, key, value, attn_mask, dropout_p, is_causal, scale, key_mask, cu_seqlens, bias, return_lse, softcap,
        sinks,
    )  # fmt: skip
    chosen = resolve_method(method)
    refuse_unless_able(chosen, inputs)
    if inputs.query.is_meta:
        out = _shapes(inputs)
    else:
        with torch.autocast(inputs.query.device.type, enabled=False):
            out = _attend(chosen, inputs)
    if not return_lse:
        return out.output
    assert out.lse is not None
    return out.output, out.lse


def _attend(method: Method, inputs: Inputs) -> AttentionOutput:
    if inputs.query.numel() == 0 or inputs.keys == 0 or inputs.value.shape[3] == 0:
        return _nothing(inputs)
    if inputs.cu_seqlens is not None and len(inputs.query) > 1:
        return _join([_attend(method, row) for row in inputs.rows()], axis=0)
    if inputs.query.dtype == torch.float16 and inputs.query.device.type == "cpu":
        # CPUs multiply float16 slowly: by way of float32 it takes a tenth to a half of the time, and is more exact
        out = _attend(method, inputs.to(torch.float32))
        return AttentionOutput(out.output.to(torch.float16), out.lse)
    if inputs.cu_seqlens is not None:
        together = method.attend_packed(inputs)
        return together or _join([_attend(method, part) for part in inputs.sequences()], axis=2)
    return _join([attend_guarded(form, part) for form, part in method.localise(inputs)], axis=0)


def _join(parts: list[AttentionOutput], axis: int) -> AttentionOutput:
    """Packed sequences (axis 2) or batch rows (axis 0), one after the other."""
    if len(parts) == 1:
        return parts[0]
    lses = [part.lse for part in parts if part.lse is not None]
    outputs = [part.output for part in parts]
    if axis == 2 and not any(output.requires_grad for output in outputs):
        # token-major, as models go on with it: their next step is then a view
        joined = torch.cat([output.transpose(1, 2) for output in outputs], 1).transpose(1, 2)
    else:
        joined = torch.cat(outputs, axis)
    return AttentionOutput(joined, torch.cat(lses, axis) if lses else None)


def _nothing(inputs: Inputs) -> AttentionOutput:
    """No queries, or no keys to attend to: zeros that are still part of the graph."""
    shape = (*inputs.query.shape[:3], inputs.value.shape[3])
    sources = [inputs.query, inputs.key, inputs.value, *(inputs.bias.parameters() if inputs.bias else ())]
    sources += [] if inputs.sinks is None else [inputs.sinks]
    zero = torch.stack([source[:0].sum().to(inputs.query.dtype) for source in sources]).sum()
    lse = None
    if inputs.need_lse:
        wide = wide_dtype(inputs.query.dtype)
        lse = torch.full(inputs.query.shape[:3], -torch.inf, dtype=wide, device=inputs.query.device)
    return AttentionOutput(inputs.query.new_zeros(shape) + zero, lse)


def _shapes(inputs: Inputs) -> AttentionOutput:
    """What meta tensors, which have no numbers, give: shapes and dtypes."""
    output = inputs.query.new_empty((*inputs.query.shape[:3], inputs.value.shape[3]))
    wide = wide_dtype(inputs.query.dtype)
    return AttentionOutput(output, output.new_empty(output.shape[:3], dtype=wide) if inputs.need_lse else None)
