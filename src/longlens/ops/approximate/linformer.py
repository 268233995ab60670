"""Linformer: softmax attention to keys and values projected along the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from longlens.errors import MethodError
from longlens.ops.approximate.blocks import recompute, repeat_heads
from longlens.ops.approximate.landmarks import attend_pooled, block_rows, pooled_scratch, segment_means
from longlens.ops.inputs import Inputs, wide_dtype
from longlens.ops.method import Method, check_count
from longlens.ops.outputs import AttentionOutput


@final
@dataclass(frozen=True, eq=False)
class Linformer(Method):
    """Linformer attention.

        O = softmax(scale Q (E K)^T) (F V)

    with E and F (rank, N). Wang et al. 2020, arXiv:2006.04768, equation 7. Time O(N r (D + Dv)), memory
    O(N (D + Dv) + r D). Bidirectional only: every projected key mixes all positions.

    Without tensors, E = F is mean pooling over `rank` consecutive segments, whose lengths differ by one at most (the
    paper's section 4, "general projections"): a function of its inputs that needs no training. It is exact softmax
    attention where there are at most `rank` (kept) keys.

    `key_projection` (E) and `value_projection` (F; None means F = E) are learned: (rank, length), or
    (Hkv, rank, length) with one for each key head; `longlens.models.linformer.LinformerProjections` holds such. n keys
    use the first n columns; more than `length` are refused. Gradients reach the tensors. They have no string form, and
    two methods are equal where they hold the same tensors.

    Kept keys are numbered through, so padding and holes change nothing.
    """

    name: ClassVar[str] = "linformer"
    rank: int = 256
    key_projection: Tensor | None = None
    value_projection: Tensor | None = None

    def __post_init__(self) -> None:
        check_count(self.name, "rank", self.rank)
        if self.key_projection is None and self.value_projection is not None:
            raise MethodError("linformer: expected key_projection beside value_projection, got None")
        for name in ("key_projection", "value_projection"):
            projection = getattr(self, name)
            if projection is None:
                continue
            if not isinstance(projection, Tensor) or projection.ndim not in (2, 3) or projection.shape[-2] != self.rank:
                got = tuple(projection.shape) if isinstance(projection, Tensor) else repr(projection)
                raise MethodError(f"linformer: expected {name} of shape ([Hkv,] {self.rank}, length), got {got}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Linformer) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[int, int, int]:
        return self.rank, id(self.key_projection), id(self.value_projection)

    def __str__(self) -> str:
        text = self.name if self.rank == 256 else f"{self.name}:{self.rank}"
        return text if self.key_projection is None else f"{text} (learned)"

    def refusals(self, inputs: Inputs) -> list[str]:
        """Learned projections that are too short, or made for another number of heads."""
        reasons = []
        for projection in (self.key_projection, self.value_projection):
            if projection is None:
                continue
            if inputs.cu_seqlens is not None:
                longest = max(b - a for a, b in zip(inputs.cu_seqlens, inputs.cu_seqlens[1:], strict=False))
            else:
                longest = inputs.keys if inputs.key_mask is None else int(inputs.key_mask.sum(1).max())
            if longest > projection.shape[-1]:
                reasons.append(f"{longest} keys, but the projections are made for at most {projection.shape[-1]}")
            if projection.ndim == 3 and projection.shape[0] not in (1, inputs.key.shape[1]):
                reasons.append(f"{inputs.key.shape[1]} key heads, but projections for {projection.shape[0]}")
        return list(dict.fromkeys(reasons))

    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Output (B, H, Nq, Dv); bidirectional."""

        def few(query: Tensor, paired: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            if self.key_projection is not None:
                of_values = self.key_projection if self.value_projection is None else self.value_projection
                return project(self.key_projection, key), project(of_values, value)
            if key.shape[3] <= self.rank:
                return key, value
            return segment_means(key, self.rank), segment_means(value, self.rank)

        return AttentionOutput(attend_pooled(inputs, few, self.rank), None)

    def reference(self, inputs: Inputs) -> Tensor:
        """The formula, row of the batch by row, with E and F as they stand."""
        rows = []
        for part in inputs.rows():
            keep = slice(None) if part.key_mask is None else part.key_mask[0]
            key, value = part.key[:, :, keep], part.value[:, :, keep]
            n = key.shape[2]
            if n > 0:
                to_keys, to_values = self._matrices(n, key)
                key, value = to_keys @ key, to_values @ value
            key, value = repeat_heads(key, part), repeat_heads(value, part)
            rows.append(torch.softmax(part.query @ key.mT * part.scale, -1) @ value)
        return torch.cat(rows)

    def _matrices(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.key_projection is None:
            segments = torch.eye(n, dtype=like.dtype, device=like.device).tensor_split(min(self.rank, n))
            pooling = torch.stack([segment.mean(0) for segment in segments])
            return pooling, pooling
        other = self.key_projection if self.value_projection is None else self.value_projection
        to_keys, to_values = (m[..., :n].to(like.device, like.dtype) for m in (self.key_projection, other))
        return to_keys, to_values

    def peak_elements(self, inputs: Inputs) -> int:
        """Predicted scratch of a forward pass."""
        return pooled_scratch(inputs, self.rank)


def project(matrix: Tensor, tokens: Tensor) -> Tensor:
    """matrix ([Hkv,] r, length) times tokens (B, Hkv, 1, n, D), n <= length: (B, Hkv, 1, r, D), in blocks of tokens."""
    dtype = wide_dtype(tokens.dtype)
    length = tokens.shape[3]
    matrix = matrix[..., :length].to(tokens.device)
    matrix = matrix if matrix.ndim == 2 else matrix.unsqueeze(1)

    def part(matrix: Tensor, tokens: Tensor) -> Tensor:
        return matrix.to(dtype) @ tokens.to(dtype)

    rows = max(256, block_rows(tokens, tokens.shape[4]))
    blocks = zip(matrix.split(rows, -1), tokens.split(rows, 3), strict=True)
    total: Tensor = sum(recompute(part, m, t) for m, t in blocks)
    return total
