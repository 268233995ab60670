"""The entry point of attention: `longlens.attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from longlens.ops.biases import Bias
from longlens.ops.inputs import under_autocast
from longlens.ops.masks import Rule
from longlens.ops.method import Method
from longlens.ops.operator import attention_traced, can_trace
from longlens.ops.run import run_attention
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
        to it; -inf in a floating mask or bias is arithmetic, as in PyTorch, and does not keep it away.

    Raises:
        InputError, MaskError, DtypeError: inputs that do not fit together.
        MethodError: a method that does not exist.
        UnsupportedError: the method cannot serve this request; the message names the reasons and the methods that can.
    """
    if torch.compiler.is_compiling():
        if not can_trace(method, attn_mask, dropout_p, bias):
            return _uncompiled(
                query, key, value, attn_mask, dropout_p, is_causal, scale, method=method, key_mask=key_mask,
                cu_seqlens=cu_seqlens, bias=bias, return_lse=return_lse, softcap=softcap, sinks=sinks,
            )  # fmt: skip
        query, key, value = under_autocast(query, key, value)
        return attention_traced(
            query, key, value, attn_mask, is_causal, scale, method, key_mask, cu_seqlens, bias, return_lse, softcap,
            sinks,
        )  # fmt: skip
    return run_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, method=method, key_mask=key_mask,
        cu_seqlens=cu_seqlens, bias=bias, return_lse=return_lse, softcap=softcap, sinks=sinks,
    )  # fmt: skip


_uncompiled = torch.compiler.disable(
    run_attention,
    reason="longlens.attention cannot be part of a compiled program with dropout, with a mask rule other than Causal, "
    "Prefix, one SameDocument and sparse methods, with a bias rule other than Alibi and RelativePosition, or by a "
    "method without a string form, such as a Linformer that learns",
)
