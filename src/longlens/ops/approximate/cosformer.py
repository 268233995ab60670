"""cosFormer: ReLU features and a cosine that falls with distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from longlens.ops.approximate.blocks import compute_dtype, reference_attention, repeat_heads
from longlens.ops.approximate.kernel_sum import Features, Sums, feature_attention, scratch_elements
from longlens.ops.inputs import Inputs
from longlens.ops.method import Method, check_count
from longlens.ops.outputs import AttentionOutput


@final
@dataclass(frozen=True)
class CosFormer(Method):
    """cosFormer attention.

        w_ij = relu(q_i) . relu(k_j) cos(pi (i - j) / 2M),    o_i = sum_j w_ij v_j / sum_j w_ij

    with the cosine split into 2 D features. Qin et al. 2022, arXiv:2202.08791, section 3.2. Time O(N D Dv), state
    2D x (Dv + 1) to a head; causal in chunks. A row of weights that is all 0 (no positive entry in common with a key
    nearer than M) gives 0, where the paper's code divides by an epsilon.

    The paper splits cos(a - b) = cos a cos b + sin a sin b. Of queries before the first key one product is negative,
    and where all weights are 0 the sum leaves rounding errors, which the normaliser would blow up. So, with e the angle
    of the last key,

        cos(a - b) = (cos(a - e) sin b + cos a sin(e - b)) / sin e,

    in which no term is negative, for angles b of keys from 0 to e and angles a that are within pi/2 of all of them.
    Causal attention keeps e = pi/2, which is the paper's split: the last key is the future, and no query that sees a
    key stands before the first.

    M, the paper's maximal length, is `horizon`. None means the length of the keys, from the first to the last that the
    key mask keeps, so that padding on either side changes nothing. Queries further than M from a key (more queries than
    keys, or padding) count as standing at M, where the cosine is 0. Causal attention needs a horizon: the length would
    leak the future into M.

    The scale's sign goes to the queries. Its size has no effect: relu(c q) = c relu(q) for c > 0, and c cancels in the
    normaliser. A scale of 0 is refused.
    """

    name: ClassVar[str] = "cosformer"
    horizon: int | None = None

    def __post_init__(self) -> None:
        if self.horizon is not None:
            check_count(self.name, "horizon", self.horizon)

    def refusals(self, inputs: Inputs) -> list[str]:
        """Causal without a horizon, more keys than the horizon, a scale of 0."""
        longest = inputs.keys
        if inputs.cu_seqlens is not None:
            longest = max(b - a for a, b in zip(inputs.cu_seqlens, inputs.cu_seqlens[1:], strict=False))
        reasons = {
            "causal needs a horizon that does not depend on the length, such as cosformer:horizon="
            f"{1 << max(0, longest - 1).bit_length()}": inputs.causal and self.horizon is None,
            f"{longest} keys do not fit in horizon {self.horizon}": (self.horizon or longest) < longest,
            "scale 0 makes every weight 0": inputs.scale == 0,
        }
        return [reason for reason, refused in reasons.items() if refused]

    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Output (B, H, Nq, Dv); bidirectional, or causal with a horizon."""
        return AttentionOutput(
            feature_attention(inputs, self._build, 2 * inputs.query.shape[3], underflows=False), None
        )

    def _build(self, inputs: Inputs, dtype: torch.dtype) -> Features:
        query, key, last, span = self._steps(inputs)
        # a single key has no sine to divide by, and takes the paper's split
        end = span if inputs.causal else torch.where(last > 0, last, span)
        of_query = (_cosine(query - end, span), _cosine(query, span))
        of_key = (_sine(key, span) / _sine(end, span), _sine(end - key, span) / _sine(end, span))
        return _Cosine(
            (of_query[0].to(dtype), of_query[1].to(dtype)),
            (of_key[0].to(dtype), of_key[1].to(dtype)),
            inputs.scale < 0,
            dtype,
        )

    def reference(self, inputs: Inputs) -> Tensor:
        """The weights as an N x N matrix."""
        sign = -1 if inputs.scale < 0 else 1
        kernel = (sign * inputs.query).relu() @ repeat_heads(inputs.key, inputs).relu().mT
        query, key, _, span = (steps.squeeze(2) for steps in self._steps(inputs))
        return reference_attention(kernel * _cosine(query - key.mT, span).to(kernel.dtype), inputs)

    def _steps(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whole numbers that count from the first kept key: positions of queries, positions of keys, each
        (B, 1, 1, N, 1), position of the last kept key and M, each (B, 1, 1, 1, 1); B is 1 without a key mask."""
        device = inputs.query.device
        q = torch.arange(inputs.queries, device=device).unsqueeze(0) + inputs.offset
        k = torch.arange(inputs.keys, device=device).unsqueeze(0)
        first, last = k[:, :1], k[:, -1:]
        if inputs.key_mask is not None:
            kept = inputs.key_mask.long()
            first = kept.argmax(1, keepdim=True)
            last = inputs.keys - 1 - kept.flip(1).argmax(1, keepdim=True)
        span = (last - first + 1).clamp_min(1) if self.horizon is None else torch.full_like(last, self.horizon)
        near = torch.minimum(q - first, span)
        if not inputs.causal:
            near = torch.maximum(near, last - first - span)
        query, key, end, quarter = (steps[:, None, None, :, None] for steps in (near, k - first, last - first, span))
        return query, key, end, quarter

    def peak_elements(self, inputs: Inputs) -> int:
        """Predicted scratch of a forward pass: blocks, and tables of angles."""
        tables = 8 * (inputs.queries + inputs.keys) * (1 if inputs.key_mask is None else inputs.query.shape[0])
        tables = tables * compute_dtype(inputs).itemsize // inputs.query.element_size()
        return scratch_elements(inputs, 2 * inputs.query.shape[3]) + tables


@dataclass(frozen=True)
class _Cosine(Features):
    of_query: tuple[Tensor, Tensor]
    of_key: tuple[Tensor, Tensor]
    negative: bool
    dtype: torch.dtype

    def query(self, block: Tensor, start: int) -> Sums:
        return _turned((-block if self.negative else block).relu(), self.of_query, start), None

    def key(self, block: Tensor, start: int) -> Sums:
        return _turned(block.relu(), self.of_key, start), None


def _cosine(steps: Tensor, span: Tensor) -> Tensor:
    """cos(pi steps / 2 span) in float64, exactly 0 at a quarter turn."""
    cosine = torch.cos(steps * (math.pi / (2 * span.double())))
    return cosine.masked_fill_(steps.abs() == span, 0.0)


def _sine(steps: Tensor, span: Tensor) -> Tensor:
    """sin(pi steps / 2 span) in float64."""
    return torch.sin(steps * (math.pi / (2 * span.double())))


def _turned(block: Tensor, tables: tuple[Tensor, Tensor], start: int) -> Tensor:
    return torch.cat([block * table.narrow(3, start, block.shape[3]) for table in tables], -1)
