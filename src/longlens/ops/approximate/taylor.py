"""Taylor: the exponential of softmax replaced by its second-order expansion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from longlens.ops.approximate.blocks import grouped, recompute, reference_attention, repeat_heads
from longlens.ops.approximate.kernel_sum import (
    Features,
    Sums,
    attend_sums,
    augment,
    feature_attention,
    flatten_heads,
    like,
    scratch_elements,
)
from longlens.ops.inputs import Inputs
from longlens.ops.method import Method
from longlens.ops.outputs import AttentionOutput

# entries multiplied together at once; a block with itself has each product twice, two blocks once at weight 2
BLOCK = 8


@final
@dataclass(frozen=True)
class Taylor(Method):
    """Attention with exp(s) expanded to second order.

        w_ij = 1 + s_ij + s_ij^2 / 2,    s_ij = scale q_i . k_j,    o_i = sum_j w_ij v_j / sum_j w_ij

    Always positive (at least 1/2). The features of x are 1, x and the products x_a x_b. Keles et al. 2023,
    arXiv:2209.04881, section 4 (the expansion of the exponential to any order; here 2).

    Cost: D(D + 1)/2 products would do; taken 8 entries at a time they make F = 1 + D + D(D + 8)/2 features, 2,369 at
    D = 64. Time O(N F Dv), state F x (Dv + 1) to a head, so it overtakes exact attention only where N is well above F:
    a method for narrow heads (F = 209 at D = 16) or very long inputs. Causal in chunks.

    Right where |s| is at most about 1; for large |s| the weights grow as s^2, also for very negative s.
    """

    name: ClassVar[str] = "taylor"

    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Output (B, H, Nq, Dv); bidirectional or causal."""
        width = feature_count(inputs.query.shape[3])
        if not inputs.causal and inputs.keys <= width // 2:
            return AttentionOutput(attend_sums(inputs, _pair_sums, inputs.keys), None)
        return AttentionOutput(feature_attention(inputs, lambda part, dtype: _Products(part.scale, dtype), width), None)

    def reference(self, inputs: Inputs) -> Tensor:
        """The weights as an N x N matrix."""
        scores = inputs.query @ repeat_heads(inputs.key, inputs).mT * inputs.scale
        return reference_attention(1 + scores + scores.square() / 2, inputs)

    def peak_elements(self, inputs: Inputs) -> int:
        """Predicted scratch of a forward pass."""
        width = feature_count(inputs.query.shape[3])
        if not inputs.causal and inputs.keys <= width // 2:
            return scratch_elements(inputs, inputs.keys)
        return scratch_elements(inputs, width)


def feature_count(width: int) -> int:
    """Features of a head of this width."""
    starts = range(0, width, BLOCK)
    return 1 + width + sum(min(BLOCK, width - a) * (width - a) for a in starts)


def products(x: Tensor, first: float, second: float) -> Tensor:
    """[1, first x, second x_a x_b]: products within a block of entries twice, between blocks once, times sqrt(2)."""
    parts = [torch.ones_like(x[..., :1]), x * first]
    scaled = x * second
    for a in range(0, x.shape[-1], BLOCK):
        left = x[..., a : a + BLOCK].unsqueeze(-1)
        own = left * scaled[..., None, a : a + BLOCK]
        parts.append(own.flatten(-2))
        if a + BLOCK < x.shape[-1]:
            parts.append((left * (scaled[..., None, a + BLOCK :] * 2**0.5)).flatten(-2))
    return torch.cat(parts, -1)


@dataclass(frozen=True)
class _Products(Features):
    scale: float
    dtype: torch.dtype

    def query(self, block: Tensor, start: int) -> Sums:
        return products(block, self.scale, self.scale**2 / 2), None

    def key(self, block: Tensor, start: int) -> Sums:
        return products(block, 1.0, 1.0), None

    def pairs(self, query: Tensor, key: Tensor, phi_q: Tensor, phi_k: Tensor) -> Tensor:
        return kernel(query @ key.mT * self.scale)


def kernel(scores: Tensor) -> Tensor:
    """1 + s + s^2 / 2."""
    return ((scores + 1).square() + 1) / 2


def _pair_sums(inputs: Inputs, dtype: torch.dtype, rows: int) -> Iterator[Sums]:
    """Sums over few keys from the pairs themselves, `rows` queries at a time."""
    query, key, value, mask = grouped(inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        values = augment(v.to(dtype), None if mask is None else mask.to(dtype))
        return like(kernel((flatten_heads(q).to(dtype) * inputs.scale) @ flatten_heads(k).to(dtype).mT) @ values, q)

    for q in query.split(rows, 3):
        yield recompute(attend, q, key, value), None
