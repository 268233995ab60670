"""Cutting inputs into blocks that stay in cache, and putting the results together. Shared by the approximators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longlens.ops.inputs import Inputs, wide_dtype
from longlens.ops.reference import allowed_pairs

# elements of a block of scratch: 2 MiB in float32 stays in a CPU's cache; a GPU wants fewer, larger steps
CPU_BLOCK, GPU_BLOCK = 2**19, 2**24


def block_elements(device: torch.device) -> int:
    """Elements that a block of scratch should have."""
    # "meta" is what explain() predicts the memory of, by default on a CPU
    return CPU_BLOCK if device.type in ("cpu", "meta") else GPU_BLOCK


def compute_dtype(inputs: Inputs) -> torch.dtype:
    """Sums are taken in at least float32."""
    return wide_dtype(inputs.query.dtype)


def recompute(function: Callable[..., Any], *args: object) -> Any:
    """`function(*args)`; under autograd its intermediates are dropped and computed again in the backward pass.

    `function` must not change in place what autograd has saved: inside a checkpoint autograd does not notice.
    """
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def join(blocks: Iterable[Tensor], dim: int, into: Tensor | None) -> Tensor:
    """Blocks laid end to end along `dim`: copied `into` a tensor where one is given, else concatenated."""
    if into is None:
        return torch.cat(list(blocks), dim)
    start = 0
    for block in blocks:
        into.narrow(dim, start, block.shape[dim]).copy_(block)
        start += block.shape[dim]
    return into


def grouped(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query (B, Hkv, G, Nq, D), key and value (B, Hkv, 1, Nk, D), key mask (B, 1, 1, Nk, 1): views."""
    mask = None if inputs.key_mask is None else inputs.key_mask[:, None, None, :, None]
    query = inputs.query.unflatten(1, (inputs.key.shape[1], inputs.groups))
    return query, inputs.key.unsqueeze(2), inputs.value.unsqueeze(2), mask


def by_pieces(inputs: Inputs, batch: int, heads: int, run: Callable[[Inputs, Tensor | None], Tensor]) -> Tensor:
    """`run` over cuts of `batch` rows by `heads` key heads; output (B, H, Nq, Dv).

    `run(piece, into)` returns (B, Hkv, G, Nq, Dv) of its piece, written into `into` where that is given.
    """
    shape = (*inputs.query.shape[:3], inputs.value.shape[3])
    output = None if inputs.needs_grad else inputs.query.new_empty(shape)
    lines = []
    for row, parts in enumerate(_cuts(inputs, batch, heads)):
        line = []
        for column, part in enumerate(parts):
            into = None
            if output is not None:
                into = output.narrow(0, row * batch, part.query.shape[0])
                into = into.narrow(1, column * heads * inputs.groups, part.heads)
                into = into.unflatten(1, (part.key.shape[1], inputs.groups))
            line.append(run(part, into))
        lines.append(line)
    if output is not None:
        return output
    return torch.cat([torch.cat(line, 1) for line in lines]).flatten(1, 2)


def _cuts(inputs: Inputs, batch: int, heads: int) -> Iterator[list[Inputs]]:
    # split, not slices: the backward pass of a slice makes a gradient of full size each time
    whole = (inputs.query, inputs.key, inputs.value)
    masks = [None] * inputs.query.shape[0] if inputs.key_mask is None else inputs.key_mask.split(batch)
    for query, key, value, mask in zip(*(t.split(batch) for t in whole), masks, strict=False):
        parts = zip(query.split(heads * inputs.groups, 1), key.split(heads, 1), value.split(heads, 1), strict=True)
        yield [replace(inputs, query=q, key=k, value=v, key_mask=mask) for q, k, v in parts]


def repeat_heads(tensor: Tensor, inputs: Inputs) -> Tensor:
    """(B, Hkv, ...) as (B, H, ...)."""
    return tensor.repeat_interleave(inputs.groups, 1)


def reference_attention(weights: Tensor, inputs: Inputs) -> Tensor:
    """Rows of `weights` (B, H, Nq, Nk) normalised over the allowed keys, times the values; 0 where they sum to 0."""
    weights = weights.masked_fill(~allowed_pairs(inputs), 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights @ repeat_heads(inputs.value, inputs) / torch.where(total == 0, 1.0, total)
