"""Two memory faults of exact attention: a gradient for a bias that needs none, and a plan for every tile's length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import longlens
from longlens.testing import peak_growths


@pytest.mark.memory
def test_a_bias_without_gradient_gets_none():
    # N x N numbers would be 64 MiB
    (growth,) = peak_growths(
        "expanded_bias:attend", [{"length": 4096}], path=[str(Path(__file__).parent)], warm_up={"length": 128}, runs=1
    )
    assert growth < 20 * 2**20


@pytest.mark.memory
@pytest.mark.parametrize("method", ["exact", "exact:blockwise"])
def test_causal_bfloat16_keeps_no_plan_for_each_tile(method):
    case = {"function": "longlens:attention", "heads": 1, "dtype": "bfloat16", "causal": True,
            "keywords": {"method": method}}  # fmt: skip
    (growth,) = peak_growths(
        "longlens.testing.memory:attention_call", [case | {"length": 12_288}], warm_up=case | {"length": 128}, runs=1
    )
    predicted = longlens.explain((1, 1, 12_288, 64), dtype=torch.bfloat16, is_causal=True, method=method).peak_bytes
    # what PyTorch's own kernels keep for themselves
    assert growth < 2 * predicted + 16 * 2**20
