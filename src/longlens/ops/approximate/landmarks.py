"""Softmax attention to few keys, or of few queries, in blocks; and the pooling that makes few of many.

Blocks of tokens are (B, Hkv, G, n, D), G query heads to a key head; keys and values have G = 1 or G.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longlens.ops.approximate.blocks import block_elements, by_pieces, compute_dtype, grouped, join, recompute
from longlens.ops.approximate.kernel_sum import State, merge_states, normalise
from longlens.ops.inputs import Inputs, wide_dtype

Few = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor] | Tensor]


def attend_pooled(inputs: Inputs, few: Few, width: int) -> Tensor:
    """Attention (B, H, Nq, Dv) through what `few` makes of the kept tokens: `width` keys and values, or all the rows.

    `few(query, paired, key, value)` gets the queries, those of them that stand at kept keys (all where Nq != Nk), and
    the kept keys and values; it returns keys and values for `attend_few`, or the output itself. With a key mask each
    batch row is taken apart, so that neither padding nor the rest of the batch has any influence.
    """

    def run(part: Inputs, into: Tensor | None) -> Tensor:
        query, key, value, mask = grouped(part)
        paired = query
        if mask is not None:
            kept = mask.flatten().nonzero().squeeze(1)
            if kept.numel() == 0:
                # zeros that are still part of the graph
                nothing = query[..., :0].sum() + key[..., :0].sum() + value[..., :0].sum()
                return join([query.new_zeros((*query.shape[:4], value.shape[4])) + nothing], 3, into)
            key, value = key.index_select(3, kept), value.index_select(3, kept)
            paired = query.index_select(3, kept) if part.queries == part.keys else query
        result = few(query, paired, key, value)
        if isinstance(result, Tensor):
            return join([result.to(query.dtype)], 3, into)
        return attend_few(query, *result, part.scale, width, into)

    rows = inputs.query.shape[0] if inputs.key_mask is None else 1
    return by_pieces(inputs, rows, inputs.key.shape[1], run)


def attend_few(query: Tensor, key: Tensor, value: Tensor, scale: float, width: int, into: Tensor | None) -> Tensor:
    """softmax(scale q k^T) v by blocks of queries, for few keys: (B, Hkv, G, Nq, Dv) in the query's dtype."""
    dtype = wide_dtype(query.dtype)
    key, value = key.to(dtype) * scale, value.to(dtype)

    def rows_of(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (torch.softmax(q.to(dtype) @ key.mT, -1) @ value).to(q.dtype)

    rows = block_rows(query, width)
    return join((recompute(rows_of, q, key, value) for q in query.split(rows, 3)), 3, into)


def attend_of_few(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v by blocks of keys, for few queries: (B, Hkv, G, m, Dv) in at least float32."""
    dtype = wide_dtype(query.dtype)
    rows = (query.to(dtype) * scale).flatten(2, 3)

    def fold(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = k.squeeze(2).to(dtype), v.squeeze(2).to(dtype)
        scores = rows @ k.mT
        peak = scores.detach().amax(-1, keepdim=True)
        weights = scores.sub_(peak).exp_()
        return torch.cat([weights @ v, weights.sum(-1, keepdim=True)], -1), peak

    state: State = (None, None)
    block = block_rows(key, rows.shape[2])
    for k, v in zip(key.split(block, 3), value.split(block, 3), strict=True):
        state = merge_states(state, recompute(fold, rows, k, v))
    assert state[0] is not None
    return normalise(state[0]).unflatten(2, query.shape[2:4])


def block_rows(tokens: Tensor, width: int) -> int:
    """Tokens of a block whose scores are `width` to a token and head."""
    each = max(width, tokens.shape[4]) * tokens.shape[0] * tokens.shape[1] * tokens.shape[2]
    return max(64, block_elements(tokens.device) // each)


def segment_means(tokens: Tensor, segments: int) -> Tensor:
    """Means of consecutive tokens, (..., segments, D) in at least float32.

    N tokens make N % segments segments of N // segments + 1 tokens, then segments shorter by one, so that any length of
    at least `segments` works without padding.
    """
    dtype = wide_dtype(tokens.dtype)
    size, longer = divmod(tokens.shape[-2], segments)
    long, short = tokens.split([longer * (size + 1), (segments - longer) * size], -2)
    means = [
        part.unflatten(-2, (-1, n)).mean(-2, dtype=dtype)
        for part, n in ((long, size + 1), (short, size))
        if part.numel()
    ]
    return torch.cat(means, -2)


def pooled_scratch(inputs: Inputs, width: int) -> int:
    """Elements that a forward pass needs beyond inputs and output, in the inputs' dtype."""
    batch = inputs.query.shape[0] if inputs.key_mask is None else 1
    query, key, value, _ = grouped(inputs)
    rows = min(block_rows(query[:batch], width), max(inputs.queries, inputs.keys))
    block = batch * inputs.heads * rows * (2 * width + inputs.query.shape[3] + inputs.value.shape[3])
    kept = 0
    if inputs.key_mask is not None:
        kept = key[:1].numel() + value[:1].numel() + (query[:1].numel() if inputs.queries == inputs.keys else 0)
    return block * compute_dtype(inputs).itemsize // inputs.query.element_size() + kept
