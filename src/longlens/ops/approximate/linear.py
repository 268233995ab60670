"""Linear attention: the softmax kernel replaced by an inner product of elu(x) + 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from longlens.ops.approximate.blocks import reference_attention, repeat_heads
from longlens.ops.approximate.kernel_sum import Features, Sums, feature_attention, scratch_elements
from longlens.ops.inputs import Inputs
from longlens.ops.method import Method
from longlens.ops.outputs import AttentionOutput


@final
@dataclass(frozen=True)
class Linear(Method):
    """Linear attention with the feature map elu + 1.

        o_i = sum_j phi(c q_i) . phi(k_j) v_j / sum_j phi(c q_i) . phi(k_j),    phi(x) = elu(x) + 1

    Katharopoulos et al. 2020, arXiv:2006.16236, equations 4 to 7 and section 3.3 (causal).
    Time O(N D Dv), state D x (Dv + 1) to a head; causal in chunks.

    The paper has no scale. Here c = scale sqrt(D), so that the default scale gives the paper's formula and another one
    sharpens (or flattens) the queries before the feature map. It is not an estimate of softmax attention but another
    attention: models are trained with it.
    """

    name: ClassVar[str] = "linear"

    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Output (B, H, Nq, Dv); bidirectional or causal."""
        width = inputs.query.shape[3]
        return AttentionOutput(feature_attention(inputs, lambda part, dtype: _Elu(_ratio(part), dtype), width), None)

    def reference(self, inputs: Inputs) -> Tensor:
        """The weights as an N x N matrix."""
        query, key = phi(inputs.query * _ratio(inputs)), phi(repeat_heads(inputs.key, inputs))
        return reference_attention(query @ key.mT, inputs)

    def peak_elements(self, inputs: Inputs) -> int:
        """Predicted scratch of a forward pass."""
        return scratch_elements(inputs, inputs.query.shape[3])


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1, written so that it keeps its relative precision where x is far below 0."""
    low = x.clamp(max=0).exp()
    # autograd keeps the exponential
    return low + x.relu() if low.requires_grad else low.add_(x.relu())


def _ratio(inputs: Inputs) -> float:
    return inputs.scale * inputs.query.shape[3] ** 0.5


@dataclass(frozen=True)
class _Elu(Features):
    ratio: float
    dtype: torch.dtype

    def query(self, block: Tensor, start: int) -> Sums:
        return phi(block if self.ratio == 1.0 else block * self.ratio), None

    def key(self, block: Tensor, start: int) -> Sums:
        return phi(block), None
