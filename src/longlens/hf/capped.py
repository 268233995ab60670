"""Softmax attention with capped scores (Gemma 2), in linear memory and with every gradient.

    p = softmax(cap tanh(scale q k^T / cap) + bias, over the allowed keys)

Riviere et al. 2024 (arXiv:2408.00118, section 2). A block of queries at a time against the keys that its rules leave;
the backward pass makes each block's scores again. A sink is a further key that takes part of the mass and holds no
value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longlens.errors import UnsupportedError
from longlens.ops.exact.exact import Exact
from longlens.ops.inputs import Inputs, check_inputs
from longlens.ops.masks import AllOf, Rule
from longlens.ops.method import Method

# queries to a block, and scores held at a time
ROWS = 128
SCORES = 2**21


def attend_capped(
    method: Method, query: Tensor, key: Tensor, value: Tensor, cap: float, sinks: Tensor | None, **given: Any
) -> Tensor:
    """(B, H, Nq, Dv) by `exact`, or over the pairs of a sparse method. `given`: as `longlens.attention` takes it."""
    if not isinstance(method, (Exact, Rule)):
        raise UnsupportedError(
            f"method '{method}' has no scores to cap (softcap={cap}); methods that have: exact, window, dilated, "
            "longformer"
        )
    whole = check_inputs(query, key, value, **given, return_lse=False)
    if whole.cu_seqlens is not None and len(query) > 1:
        return torch.cat([_attend_row(method, row, cap, sinks) for row in whole.rows()])
    return _attend_row(method, whole, cap, sinks)


def _attend_row(method: Method, whole: Inputs, cap: float, sinks: Tensor | None) -> Tensor:
    sequences = [whole] if whole.cu_seqlens is None else list(whole.sequences())
    outputs = []
    for sequence in sequences:
        rows = [_attend(form, part, cap, sinks) for form, part in method.localise(sequence)]
        outputs.append(torch.cat(rows))
    return torch.cat(outputs, 2)


def _attend(form: Method, inputs: Inputs, cap: float, sinks: Tensor | None) -> Tensor:
    rules = [rule for rule in (inputs.mask_rule(), form) if isinstance(rule, Rule)]
    rule = AllOf(tuple(rules)) if rules else None
    blocks = []
    for start in range(0, inputs.queries, ROWS):
        rows = slice(start, min(start + ROWS, inputs.queries))
        span = (0, inputs.keys)
        if rule is not None:
            span = rule.span(rows.start + inputs.offset, rows.stop + inputs.offset, inputs.keys)
        keys = slice(span[0], max(span))
        parts = [
            _block(inputs, rule, rows, keys, batch, heads, cap, sinks)
            for batch, heads in _lanes(inputs, size=(rows.stop - rows.start) * (keys.stop - keys.start))
        ]
        heads_of_row = inputs.key.shape[1] // (parts[0].shape[1] // inputs.groups)
        by_row = [torch.cat(parts[i : i + heads_of_row], 1) for i in range(0, len(parts), heads_of_row)]
        blocks.append(torch.cat(by_row))
    return torch.cat(blocks, 2) if blocks else inputs.value.new_zeros((*inputs.query.shape[:3], inputs.value.shape[3]))


def _lanes(inputs: Inputs, size: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of batch rows and of key heads whose scores fit: everything, or row by row, or a few heads of a row."""
    batch, heads = inputs.query.shape[0], inputs.key.shape[1]
    if batch * heads * inputs.groups * size <= SCORES:
        yield slice(0, batch), slice(0, heads)
        return
    step = next(n for n in range(heads, 0, -1) if heads % n == 0 and (n == 1 or n * inputs.groups * size <= SCORES))
    for row in range(batch):
        for head in range(0, heads, step):
            yield slice(row, row + 1), slice(head, head + step)


def _block(
    inputs: Inputs, rule: Rule | None, rows: slice, keys: slice, batch: slice, heads: slice, cap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """(batch, heads, rows, Dv) of some batch rows and key heads."""
    groups, n = inputs.groups, inputs.keys
    query_heads = slice(heads.start * groups, heads.stop * groups)

    def attend(query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None) -> Tensor:
        q = torch.arange(rows.start, rows.stop, device=key.device).unsqueeze(1) + inputs.offset
        k = torch.arange(keys.start, keys.stop, device=key.device).unsqueeze(0)
        scores = query.unflatten(1, (-1, groups)) @ key.unsqueeze(2).transpose(-1, -2) * inputs.scale
        scores = (cap * torch.tanh(scores / cap)).flatten(1, 2)
        if inputs.bias is not None:
            scores = scores + _cut(inputs.bias.tile(q, k, n), batch, query_heads)
        keep = torch.ones((), dtype=torch.bool, device=key.device)
        if rule is not None:
            keep = keep & _cut(rule.allowed(q, k, n), batch, query_heads)
        if inputs.key_mask is not None:
            keep = keep & inputs.key_mask[batch, None, None, keys]
        # the lowest number rather than -inf: a row without keys has then a gradient of 0, and is zeroed below
        wide = torch.promote_types(scores.dtype, torch.float32)
        scores = scores.to(wide).masked_fill(~keep, torch.finfo(wide).min)
        if sink is not None:
            column = sink.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        weights = torch.softmax(scores, -1)[..., : keys.stop - keys.start].masked_fill(~keep, 0.0)
        weights = F.dropout(weights.to(value.dtype), inputs.dropout, training=inputs.dropout > 0)
        return (weights.unflatten(1, (-1, groups)) @ value.unsqueeze(2)).flatten(1, 2)

    given = (
        inputs.query[batch, query_heads, rows], inputs.key[batch, heads, keys], inputs.value[batch, heads, keys],
        None if sinks is None else sinks[query_heads],
    )  # fmt: skip
    if torch.is_grad_enabled():
        return checkpoint(attend, *given, use_reentrant=False)
    return attend(*given)


def _cut(tensor: Tensor, batch: slice, heads: slice) -> Tensor:
    """Some batch rows and heads of what broadcasts to (B, H, rows, keys)."""
    tensor = tensor.view((1,) * (4 - tensor.ndim) + tensor.shape)
    tensor = tensor if tensor.shape[0] == 1 else tensor[batch]
    return tensor if tensor.shape[1] == 1 else tensor[:, heads]
