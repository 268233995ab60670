"""The approximators under test, with parameters small enough that every path is taken, and how they are compared."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longlens import CosFormer, Linear, Linformer, Nystrom, Performer, Scatterbrain, Taylor
from longlens.models.linformer import LinformerProjections
from longlens.ops.inputs import Inputs, check_inputs
from longlens.ops.method import Method

torch.manual_seed(0)
LEARNED = LinformerProjections(1000, 16, heads=2).double().requires_grad_(False)

CAUSAL: tuple[Method, ...] = (
    Linear(),
    Performer(32),
    Performer(32, seed=3, kernel="relu"),
    CosFormer(1000),
    Taylor(),
    Scatterbrain(20, 32),
)
METHODS: tuple[Method, ...] = (*CAUSAL, CosFormer(), Nystrom(16), Linformer(16), LEARNED.method())
MODES = [(method, False) for method in METHODS] + [(method, True) for method in CAUSAL]
MODE_NAMES = [f"{method}{', causal' if causal else ''}" for method, causal in MODES]


def make(
    queries: int = 130,
    keys: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 8,
    value_width: int = 5,
    size: float = 1.0,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Inputs:
    """Checked normal inputs, entries of query and key times `size`."""
    keys = queries if keys is None else keys
    query = torch.randn(batch, heads, queries, width, dtype=torch.float64) * size
    key = torch.randn(batch, kv_heads, keys, width, dtype=torch.float64) * size
    value = torch.randn(batch, kv_heads, keys, value_width, dtype=torch.float64)
    tensors = [tensor.to(dtype).requires_grad_(grad) for tensor in (query, key, value)]
    return check_inputs(*tensors, None, 0.0, causal, scale, key_mask, None, None, False)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return replace(inputs, query=inputs.query.to(dtype), key=inputs.key.to(dtype), value=inputs.value.to(dtype))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    """Equal up to `tolerance` of the largest entry."""
    top = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(top, 1e-3))
