"""Performer: the softmax kernel estimated by positive orthogonal random features (FAVOR+)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, final

import torch
from torch import Tensor

from longlens.errors import MethodError
from longlens.ops.approximate.blocks import reference_attention, repeat_heads
from longlens.ops.approximate.kernel_sum import Features, Sums, feature_attention, scratch_elements
from longlens.ops.inputs import Inputs
from longlens.ops.method import LARGEST_SEED, Method, check_count
from longlens.ops.outputs import AttentionOutput

# added to the ReLU features so that no row is without weight: the 1e-3 of the paper's code, rounded to a power of two,
# because a long sum of a constant that is no multiple of the sum's last place drifts
RELU_FLOOR = 2.0**-10


@final
@dataclass(frozen=True)
class Performer(Method):
    """Attention by FAVOR+: positive orthogonal random features of the softmax kernel.

        exp(scale q . k) = E_w[ phi_w(q) phi_w(k) ],    phi_w(x) = exp(w . x' - |x'|^2 / 2),    x' = sqrt(scale) x

    over w ~ N(0, I), estimated by `features` rows w that are orthogonal in blocks of D. Choromanski et al. 2021,
    arXiv:2009.14794, lemma 1 (positive features), section 2.4 (orthogonal rows), algorithm 1. `kernel="relu"` is its
    generalized attention, phi_w(x) = relu(w . x') + 2^-10: another attention, not an estimate of softmax, and
    one on which the size of the scale acts only through that floor, since relu(c x) = c relu(x).

    Time O(N F (D + Dv)), state F x (Dv + 1) to a head; causal in chunks. The paper's m is `features`, its d^(-1/4) is
    sqrt(scale); a negative scale gives its sign to the queries. Stabilisers cancel exactly; no epsilon is added to the
    softmax kernel. The error grows as exp(|q' + k'|^2): small norms need few features, those of trained models many.

    The features depend on (features, D, seed) alone, whatever the device and dtype.
    """

    name: ClassVar[str] = "performer"
    features: int = 256
    seed: int = 0
    kernel: str = "softmax"

    def __post_init__(self) -> None:
        check_count(self.name, "features", self.features)
        check_count(self.name, "seed", self.seed, 0, LARGEST_SEED)
        if self.kernel not in ("softmax", "relu"):
            raise MethodError(f"performer: expected kernel to be 'softmax' or 'relu', got {self.kernel!r}")

    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Output (B, H, Nq, Dv); bidirectional or causal."""
        return AttentionOutput(feature_attention(inputs, self.build, self.features), None)

    def build(self, inputs: Inputs, dtype: torch.dtype, scaled: bool = False) -> Features:
        """The feature map for `inputs`; `scaled` where the queries' logarithms are wanted too."""
        q, k = self._projections(inputs, dtype)
        return _Favor(q, k, abs(inputs.scale) / 2, dtype, scaled) if self.kernel == "softmax" else _Relu(q, k, dtype)

    def _projections(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows w with sqrt(scale) taken in, for queries and for keys: (D, F) each."""
        w = orthogonal_features(self.features, inputs.query.shape[3], self.seed).to(inputs.query.device, dtype).mT
        root = abs(inputs.scale) ** 0.5
        return w * (root if inputs.scale >= 0 else -root), w * root

    def reference(self, inputs: Inputs) -> Tensor:
        """The estimated kernel as an N x N matrix, without stabilisers."""
        return reference_attention(self.kernel_matrix(inputs), inputs)

    def kernel_matrix(self, inputs: Inputs) -> Tensor:
        """phi(q_i) . phi(k_j) for all pairs, (B, H, Nq, Nk); divided by `features` it estimates the kernel."""
        query, key = inputs.query, repeat_heads(inputs.key, inputs)
        q, k = self._projections(inputs, query.dtype)
        if self.kernel == "relu":
            return ((query @ q).relu() + RELU_FLOOR) @ ((key @ k).relu() + RELU_FLOOR).mT
        half = abs(inputs.scale) / 2
        phi_q = torch.exp(query @ q - half * query.square().sum(-1, keepdim=True))
        return phi_q @ torch.exp(key @ k - half * key.square().sum(-1, keepdim=True)).mT

    def peak_elements(self, inputs: Inputs) -> int:
        """Predicted scratch of a forward pass."""
        return scratch_elements(inputs, self.features)


@lru_cache(maxsize=64)
def orthogonal_features(features: int, width: int, seed: int) -> Tensor:
    """(features, width) float64 on the CPU: rows orthogonal in blocks of `width`, with the lengths of Gaussian rows."""
    # not the bare seed: inputs drawn under torch.manual_seed(seed) would be the very rows of the projection
    generator = torch.Generator().manual_seed((seed + 1) * 0x9E3779B97F4A7C15 % 2**63)
    blocks = []
    for _ in range(-(-features // width)):
        gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        # uniform over all orthogonal matrices only with the signs of r taken out
        blocks.append(q * r.diagonal().sign())
    lengths = torch.randn(features, width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:features] * lengths


@dataclass(frozen=True)
class _Favor(Features):
    to_query: Tensor
    to_key: Tensor
    half: float
    dtype: torch.dtype
    scaled: bool = False

    def query(self, block: Tensor, start: int) -> Sums:
        phi, peak = _exponentials(block @ self.to_query)
        return phi, peak - self._half_square(block) if self.scaled else None

    def key(self, block: Tensor, start: int) -> Sums:
        phi, peak = _exponentials(block @ self.to_key)
        return phi, peak - self._half_square(block)

    def _half_square(self, block: Tensor) -> Tensor:
        return block.square().sum(-1, keepdim=True) * self.half


def _exponentials(projected: Tensor) -> tuple[Tensor, Tensor]:
    """exp of each row relative to its largest entry, which is the second result. In place: `projected` is used up."""
    peak = projected.detach().amax(-1, keepdim=True)
    return projected.sub_(peak).exp_(), peak


@dataclass(frozen=True)
class _Relu(Features):
    to_query: Tensor
    to_key: Tensor
    dtype: torch.dtype

    def query(self, block: Tensor, start: int) -> Sums:
        return (block @ self.to_query).relu_() + RELU_FLOOR, None

    def key(self, block: Tensor, start: int) -> Sums:
        return (block @ self.to_key).relu_() + RELU_FLOOR, None
