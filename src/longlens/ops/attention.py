"""The entry point of attention: check, refuse or choose, call."""

from __future__ import annotations

import torch
from torch import Tensor

from longlens.errors import MethodError
from longlens.ops.biases import Bias
from longlens.ops.choose import refuse_unless_able
from longlens.ops.inputs import Inputs, check_inputs, under_autocast
from longlens.ops.masks import Rule
from longlens.ops.method import Method
from longlens.ops.nonfinite import attend_guarded
from longlens.ops.operator import attention_traced, can_trace, serve
from longlens.ops.outputs import AttentionOutput
from longlens.ops.registry import parse_method
from longlens.shapes import CuSeqlens, Key, KeyMask, LogSumExp, Output, Query, Value


def attention(
    query: Query,
    key: Key,
    value: Value,
    attn_mask: Rule | Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    method: Method | str = "exact",
    key_mask: KeyMask | None = None,
    cu_seqlens: CuSeqlens | None = None,
    bias: Bias | Tensor | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Output | tuple[Output, LogSumExp]:
    """Attention in memory linear in the length, by any of three families behind one call.

        softmax(cap(scale query key^T) + bias, over the allowed keys) value

    Args:
        query: (B, H, Nq, D).
        key: (B, Hkv, Nk, D); Hkv divides H (grouped-query attention needs no flag).
        value: (B, Hkv, Nk, Dv); Dv may differ from D.
        attn_mask: a mask rule (`longlens.Window(256)`, `longlens.Predicate(f)`, ..., composed with `&`), or, as a
            quadratic escape hatch, a tensor that broadcasts to (B, H, Nq, Nk): bool with True = attend, or floating,
            added to the scores.
        dropout_p: probability of dropping an attention weight. Applied whenever it is above 0.
        is_causal: query i attends to keys up to i + (Nk - Nq): the last query sees every key.
        scale: factor of the scores; D**-0.5 where None.
        method: a method object (`longlens.Performer(features=256)`) or its string form ("performer:256").
        key_mask: (B, Nk) bool, True = keep: padding in linear memory.
        cu_seqlens: (S + 1,) int32 boundaries of S sequences packed along N; none attends to another. With B > 1 they
            count along the rows laid end to end, from 0 to B N, and each row's end is one of them.
        bias: a rule (`longlens.Alibi(heads)`, `longlens.RelativePosition(table)`) or a tensor; both get gradients.
        return_lse: also return the log-sum-exp of the scores, (B, H, Nq), natural logarithm; float32, or float64 for
            float64 inputs.
        softcap: scores become softcap tanh(s / softcap) before bias and masks (Gemma 2); positive and finite. No cap
            where None.
        sinks: (H,) logits of one further key for each head, which holds no value and takes part of each row's mass
            (GPT-OSS); they get gradients. The log-sum-exp then includes the sink, so that exp(score - lse) is the
            weight of a key.

    Returns:
        (B, H, Nq, Dv) in the inputs' dtype; with `return_lse`, a pair of it and the log-sum-exp. A query with no key
        to attend to gets 0 and -inf, sink or not. A non-finite key or value reaches only the queries that may attend
        to it.

    Raises:
        InputError, MaskError, DtypeError: inputs that do not fit together.
        MethodError: a method that does not exist.
        UnsupportedError: the method cannot serve this request; the message names the reasons and the methods that can.
    """
    if torch.compiler.is_compiling():
        if not can_trace(attn_mask, dropout_p, bias):
            return _uncompiled(
                query, key, value, attn_mask, dropout_p, is_causal, scale, method=method, key_mask=key_mask,
                cu_seqlens=cu_seqlens, bias=bias, return_lse=return_lse, softcap=softcap, sinks=sinks,
            )  # fmt: skip
        query, key, value = under_autocast(query, key, value)
        return attention_traced(
            query, key, value, attn_mask, is_causal, scale, method, key_mask, cu_seqlens, bias, return_lse, softcap,
            sinks,
        )  # fmt: skip
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


serve(attention)
_uncompiled = torch.compiler.disable(
    attention,
    reason="longlens.attention cannot be part of a compiled program with dropout, with a mask rule other than Causal, "
    "Prefix, one SameDocument and sparse methods, or with a bias rule other than Alibi and RelativePosition",
)


def resolve_method(method: Method | str) -> Method:
    """`method` itself, or what its string form names."""
    if isinstance(method, str):
        return parse_method(method)
    if not isinstance(method, Method):
        raise MethodError(f"expected a method such as longlens.Window(256) or 'window:256', got {method!r}")
    return method


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
        return _join([_attend(method, part) for part in inputs.sequences()], axis=2)
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
    zero = inputs.query[:0].sum() + inputs.key[:0].sum() + inputs.value[:0].sum()
    lse = None
    if inputs.need_lse:
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        lse = torch.full(inputs.query.shape[:3], -torch.inf, dtype=wide, device=inputs.query.device)
    return AttentionOutput(inputs.query.new_zeros(shape) + zero, lse)


def _shapes(inputs: Inputs) -> AttentionOutput:
    """What meta tensors, which have no numbers, give: shapes and dtypes."""
    output = inputs.query.new_empty((*inputs.query.shape[:3], inputs.value.shape[3]))
    wide = torch.promote_types(inputs.query.dtype, torch.float32)
    return AttentionOutput(output, output.new_empty(output.shape[:3], dtype=wide) if inputs.need_lse else None)
