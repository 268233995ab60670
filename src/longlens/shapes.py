"""Axis letters, layout and mask meaning: defined once, here.

    B    batch
    H    query heads; Hkv key/value heads (Hkv divides H: grouped-query attention, no flag)
    Nq   queries; Nk keys; N when they are the same
    D    width of a query or key; Dv width of a value

Layout is (B, H, N, D), as in `torch.nn.functional.scaled_dot_product_attention`.

Masks: bool, **True = attend**, everywhere (`torch.nn.MultiheadAttention` means the opposite). A key mask is (B, Nk).

Positions: key j stands at j, query i at i + (Nk - Nq), so that the last query sees what the last key sees
(bottom-right alignment, as in KV caches and flash-attention). Causal means: key position <= query position.

Packing: `cu_seqlens` (int32, S + 1) holds the boundaries of S sequences laid end to end along N. With B > 1 they count
along the batch rows laid end to end, and each row's end is one of them.

Log-sum-exp: natural logarithm, float32, (B, H, Nq), of scaled, biased and masked scores. A query with nothing to
attend to gives output 0, log-sum-exp -inf and gradient 0.
"""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

Query: TypeAlias = Float[Tensor, "B H Nq D"]
Key: TypeAlias = Float[Tensor, "B Hkv Nk D"]
Value: TypeAlias = Float[Tensor, "B Hkv Nk Dv"]
Output: TypeAlias = Float[Tensor, "B H Nq Dv"]
LogSumExp: TypeAlias = Float[Tensor, "B H Nq"]
KeyMask: TypeAlias = Bool[Tensor, "B Nk"]
CuSeqlens: TypeAlias = Int[Tensor, " S1"]
