"""Memory that is easily forgotten: gradients that nobody needs, plans for every tile's length, copies in float32."""

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


@pytest.mark.memory
@pytest.mark.parametrize("method", ["window:256", "exact"])
def test_half_precision_is_not_copied_to_float32_as_a_whole(method):
    length = 65_536 if method == "window:256" else 8192
    case = {"function": "longlens:attention", "heads": 4, "dtype": "bfloat16", "keywords": {"method": method}}
    (growth,) = peak_growths(
        "longlens.testing.memory:attention_call", [case | {"length": length}], warm_up=case | {"length": 512}, runs=1
    )
    tensor = 4 * length * 64 * 2
    # the output, and scratch that does not grow with the length; a copy of one tensor has two of it
    assert growth < 1.75 * tensor + 12 * 2**20
