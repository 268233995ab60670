"""Nystrom attention: softmax attention through landmarks and a pseudo-inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from longlens.ops.approximate.blocks import repeat_heads
from longlens.ops.approximate.landmarks import attend_of_few, attend_pooled, pooled_scratch, segment_means
from longlens.ops.inputs import Inputs
from longlens.ops.method import Method, check_count
from longlens.ops.outputs import AttentionOutput


@final
@dataclass(frozen=True)
class Nystrom(Method):
    """Nystrom attention (Nystromformer).

        O = softmax(c Q K~^T) A^+ softmax(c Q~ K^T) V,    A = softmax(c Q~ K~^T),    c = scale

    with Q~, K~ the means of `landmarks` consecutive segments of queries and of keys, and A^+ the pseudo-inverse by
    `iterations` steps Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from Z = A^T / (|A|_1 |A|_inf). Xiong et al.
    2021, arXiv:2102.03902, equations 11 to 15; its m is `landmarks`, its depthwise convolution is left to models.

    Time O(N m (D + Dv) + m^3), memory O(N (D + Dv) + m^2). Bidirectional only. With at most `landmarks` queries or keys
    (kept ones) it is exact softmax attention. Weights may be negative.

    Only kept keys count, and where Nq = Nk only queries at kept keys make landmarks: padding changes nothing. Segments
    may differ in length by one, and the pseudo-inverse starts from the norms of its own matrix.
    """

    name: ClassVar[str] = "nystrom"
    landmarks: int = 64
    iterations: int = 6

    def __post_init__(self) -> None:
        check_count(self.name, "landmarks", self.landmarks)
        check_count(self.name, "iterations", self.iterations)

    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Output (B, H, Nq, Dv); bidirectional."""

        def few(query: Tensor, paired: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | Tensor:
            if key.shape[3] <= self.landmarks:
                return key, value
            if query.shape[3] <= self.landmarks:
                return attend_of_few(query, key, value, inputs.scale)
            q, k = segment_means(paired, self.landmarks), segment_means(key, self.landmarks)
            middle = torch.softmax(q @ k.mT * inputs.scale, -1)
            return k, pseudo_inverse(middle, self.iterations) @ attend_of_few(q, key, value, inputs.scale)

        return AttentionOutput(attend_pooled(inputs, few, self.landmarks), None)

    def reference(self, inputs: Inputs) -> Tensor:
        """The formula, row of the batch by row, with its N x m matrices as they stand."""
        rows = []
        for part in inputs.rows():
            query, key, value = part.query, repeat_heads(part.key, part), repeat_heads(part.value, part)
            paired = query
            if part.key_mask is not None:
                keep = part.key_mask[0]
                key, value = key[:, :, keep], value[:, :, keep]
                paired = query[:, :, keep] if part.queries == part.keys else query
            n = key.shape[2]
            if min(n, part.queries) <= self.landmarks:
                rows.append(torch.softmax(query @ key.mT * part.scale, -1) @ value)
                continue
            q, k = (_means(t, self.landmarks) for t in (paired, key))
            left, middle, right = (torch.softmax(a @ b.mT * part.scale, -1) for a, b in ((query, k), (q, k), (q, key)))
            rows.append(left @ pseudo_inverse(middle, self.iterations) @ (right @ value))
        return torch.cat(rows)

    def peak_elements(self, inputs: Inputs) -> int:
        """Predicted scratch of a forward pass."""
        return pooled_scratch(inputs, self.landmarks)


def pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Pseudo-inverse of row-stochastic matrices (..., m, m) by a third-order iteration, each from its own norms."""
    # |A|_inf, the largest row sum, is 1 since rows are softmaxes
    inverse = matrix.mT / matrix.sum(-2).amax(-1)[..., None, None]
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = inverse @ (13 * one - product @ (15 * one - product @ (7 * one - product))) / 4
    return inverse


def _means(tokens: Tensor, segments: int) -> Tensor:
    """Means of the segments that `tensor_split` cuts."""
    return torch.stack([part.mean(2) for part in tokens.tensor_split(segments, 2)], 2)
