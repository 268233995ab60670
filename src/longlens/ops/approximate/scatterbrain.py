"""Scatterbrain: a window computed exactly, and a Performer for every other pair."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, final

import torch
from torch import Tensor

from longlens.ops.approximate.blocks import compute_dtype, grouped, recompute, reference_attention, repeat_heads
from longlens.ops.approximate.kernel_sum import NO_KEY, Sums, attend_sums, causal_sums, scratch_elements
from longlens.ops.approximate.performer import Performer
from longlens.ops.inputs import Inputs
from longlens.ops.method import LARGEST_SEED, Method, check_count
from longlens.ops.outputs import AttentionOutput


@final
@dataclass(frozen=True)
class Scatterbrain(Method):
    """Sparse and low-rank attention in one normaliser.

        o_i = sum_j w_ij v_j / sum_j w_ij,    w_ij = exp(scale q_i . k_j)  where |i - j| <= window,
                                              w_ij = phi(q_i) . phi(k_j)   elsewhere

    with Performer's phi, an unbiased estimate of the exponential from `features` random features. Chen et al. 2021,
    arXiv:2110.15343, section 4. The paper adds exp(s) - phi . phi on the sparse pairs to the low-rank sum; here the
    low-rank sums leave those pairs out, which is the same without cancellation, so that all weights are positive: they
    are causal sums that end window + 1 positions before the query, from either side.

    Time O(N (window D + F (D + Dv))), memory linear. Causal keeps the left half. Better than a window alone where
    distant keys matter together, and than a Performer where most weight is near.
    """

    name: ClassVar[str] = "scatterbrain"
    window: int = 256
    features: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.name, "window", self.window, 0)
        check_count(self.name, "features", self.features)
        check_count(self.name, "seed", self.seed, 0, LARGEST_SEED)

    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Output (B, H, Nq, Dv); bidirectional or causal."""
        return AttentionOutput(attend_sums(inputs, self._sums, self._width), None)

    @property
    def _width(self) -> int:
        return max(self.features, self._chunk * (1 + 2 * -(-self.window // self._chunk)))

    @property
    def _chunk(self) -> int:
        return min(256, max(64, self.window))

    def _sums(self, inputs: Inputs, dtype: torch.dtype, rows: int) -> Iterator[Sums]:
        far = [self._far(inputs, dtype)]
        if not inputs.causal:
            sums, log = self._far(_reversed(inputs), dtype)
            far.append((sums.flip(3), log.flip(3)))
        near = window_sums(inputs, dtype, self.window, self._chunk)
        sizes = _grid(inputs, self._chunk)[1]
        split = [part.split(sizes, 3) for pair in far for part in pair]
        for (sums, log), *others in zip(near, *split, strict=True):
            logs = [log, *others[1::2]]
            top = torch.stack([part.detach() for part in logs]).amax(0)
            parts = zip([sums, *others[::2]], logs, strict=True)
            total: Tensor = sum(part * (log - top).exp() for part, log in parts)
            yield total, top

    def _far(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Sums over the keys more than `window` before each query, and their logarithm, for all queries at once."""
        features = Performer(self.features, self.seed).build(inputs, dtype, scaled=True)
        shifted = replace(inputs, offset=inputs.offset - self.window - 1)
        sums, logs = zip(*causal_sums(shifted, features, self.features), strict=True)
        return torch.cat(sums, 3), torch.cat([log for log in logs if log is not None], 3) - math.log(self.features)

    def reference(self, inputs: Inputs) -> Tensor:
        """The weights as an N x N matrix."""
        key = repeat_heads(inputs.key, inputs)
        weights = torch.exp(inputs.query @ key.mT * inputs.scale)
        estimate = Performer(self.features, self.seed).kernel_matrix(inputs) / self.features
        q = torch.arange(inputs.queries, device=key.device).unsqueeze(1) + inputs.offset
        k = torch.arange(inputs.keys, device=key.device)
        return reference_attention(torch.where((q - k).abs() <= self.window, weights, estimate), inputs)

    def peak_elements(self, inputs: Inputs) -> int:
        """Predicted scratch of a forward pass: blocks, and the sums over distant keys from each side."""
        far = inputs.heads * inputs.queries * (inputs.value.shape[3] + 2) * (2 if inputs.causal else 4)
        far = far * compute_dtype(inputs).itemsize // inputs.query.element_size()
        return scratch_elements(inputs, self._width) + far


def _reversed(inputs: Inputs) -> Inputs:
    """The same attention with the order of tokens turned round."""
    query, key, value = (t.flip(2) for t in (inputs.query, inputs.key, inputs.value))
    mask = None if inputs.key_mask is None else inputs.key_mask.flip(1)
    offset = inputs.keys - inputs.queries - inputs.offset
    return replace(inputs, query=query, key=key, value=value, key_mask=mask, offset=offset)


def _grid(inputs: Inputs, chunk: int) -> tuple[int, list[int]]:
    """Chunks cut by position: the number of the first, and how many queries each has."""
    first = inputs.offset // chunk
    stop = inputs.offset + inputs.queries
    edges = [inputs.offset, *range((first + 1) * chunk, stop, chunk), stop]
    return first, [b - a for a, b in pairwise(edges)]


def window_sums(inputs: Inputs, dtype: torch.dtype, window: int, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sums of exp(s) over the keys within `window` of each query, and their logarithm, a chunk of queries at a time."""
    query, key, value, mask = grouped(inputs)
    first, sizes = _grid(inputs, chunk)
    reach = -(-window // chunk)
    masks = () if mask is None else mask.split(chunk, 3)
    keys, values = key.split(chunk, 3), value.split(chunk, 3)
    start = inputs.offset

    # the numbers are arguments: a block that is recomputed must not see those of a later one
    def attend(start: int, low: int, count: int, q: Tensor, *near: Tensor) -> tuple[Tensor, Tensor]:
        # keys, values and masks of the chunks around, one after the other
        third = [torch.cat(near[i : i + count], 3) for i in range(0, len(near), count)]
        k, v, keep = (third[0].to(dtype), third[1].to(dtype), third[2] if len(third) > 2 else None)
        away = torch.arange(low, low + k.shape[3], device=q.device)
        away = away - torch.arange(start, start + q.shape[3], device=q.device).unsqueeze(1)
        banned = (away.abs() > window) | (away > 0) if inputs.causal else away.abs() > window
        if keep is not None:
            banned = banned | ~keep.mT
        scores = ((q.to(dtype) * inputs.scale) @ k.mT).masked_fill(banned, -torch.inf)
        peak = scores.detach().amax(-1, keepdim=True).clamp_min(NO_KEY)
        return (scores - peak).exp() @ torch.cat([v, torch.ones_like(v[..., :1])], -1), peak

    for number, q in enumerate(query.split(sizes, 3), first):
        low, high = max(0, number - reach), max(0, number + 1 + (0 if inputs.causal else reach))
        count = len(keys[low:high])
        if count:
            near = (*keys[low:high], *values[low:high], *masks[low:high])
            yield recompute(attend, start, low * chunk, count, q, *near)
        else:
            zeros = q.new_zeros((*q.shape[:4], value.shape[4] + 1), dtype=dtype) + q[..., :0].sum()
            yield zeros, zeros[..., -1:] + NO_KEY
        start += q.shape[3]
