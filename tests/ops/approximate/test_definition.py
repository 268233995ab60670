"""Every approximator equals its definition: outputs, gradients, second derivatives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from approximators import CAUSAL, METHODS, MODE_NAMES, MODES, assert_same, make
from torch import Tensor

from longlens import CosFormer, Taylor
from longlens.ops.inputs import Inputs
from longlens.ops.method import Method

modes = pytest.mark.parametrize(("method", "causal"), MODES, ids=MODE_NAMES)


def compare(method: Method, inputs: Inputs) -> None:
    """Output and gradients against the definition; the plan without gradients against both."""
    leaves = [inputs.query, inputs.key, inputs.value]
    expected, found = method.reference(inputs), method.attend(inputs).output
    assert found.dtype == inputs.query.dtype
    assert_same(found, expected)
    with torch.no_grad():
        assert_same(method.attend(inputs).output, expected)
    weights = torch.randn_like(expected)
    want = torch.autograd.grad((expected * weights).sum(), leaves)
    for got, wanted in zip(torch.autograd.grad((found * weights).sum(), leaves), want, strict=True):
        assert_same(got, wanted, 1e-10)


def masks(keys: int) -> dict[str, Tensor]:
    """Padding left and right, holes, and one row of the batch with no key."""
    at = torch.arange(keys)
    full = at >= 0
    return {
        "left": torch.stack([at >= keys // 3, full]),
        "right": torch.stack([full, at < keys - keys // 4]),
        "holes": torch.rand(2, keys) < 0.6,
        "none": torch.stack([full, ~full]),
    }


@modes
@pytest.mark.parametrize("lengths", [(1, 1), (63, 63), (1000, 1000), (300, 120), (5, 300)])
def test_lengths(method: Method, causal: bool, lengths: tuple[int, int]) -> None:
    compare(method, make(*lengths, causal=causal, grad=True))


@modes
@pytest.mark.parametrize("kind", ["left", "right", "holes", "none"])
@pytest.mark.parametrize("lengths", [(200, 200), (150, 200)])
def test_key_masks(method: Method, causal: bool, kind: str, lengths: tuple[int, int]) -> None:
    compare(method, make(*lengths, causal=causal, grad=True, key_mask=masks(200)[kind]))


@modes
@pytest.mark.parametrize("scale", [0.02, -0.4])
def test_small_and_negative_scales(method: Method, causal: bool, scale: float) -> None:
    compare(method, make(causal=causal, grad=True, scale=scale))


@pytest.mark.parametrize("method", [method for method in METHODS if not isinstance(method, CosFormer)], ids=str)
def test_scale_matters(method: Method) -> None:
    inputs = make()
    other = replace(inputs, scale=3 * inputs.scale)
    assert (method.attend(inputs).output - method.attend(other).output).abs().max() > 1e-4


@pytest.mark.parametrize("method", CAUSAL, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", [-150, -30, 7, 400])
def test_queries_may_stand_anywhere(method: Method, causal: bool, offset: int) -> None:
    if isinstance(method, CosFormer) and not causal:
        method = CosFormer()
    compare(method, replace(make(150, 200, causal=causal, grad=True), offset=offset))


@pytest.mark.parametrize("width", [1, 8, 19, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_taylor_widths(width: int, causal: bool) -> None:
    compare(Taylor(), make(120, 90, width=width, causal=causal, grad=True))


@modes
def test_many_lanes_are_cut_into_pieces(method: Method, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(200, batch=3, heads=6, kv_heads=2, causal=causal, key_mask=torch.rand(3, 200) < 0.7)
    monkeypatch.setattr("longlens.ops.approximate.blocks.CPU_BLOCK", 2**12)
    assert_same(method.attend(whole).output, method.reference(whole))


@modes
def test_second_derivatives(method: Method, causal: bool) -> None:
    # long enough for several chunks: the product of the Hessian with a vector, against the definition's
    inputs = make(300, batch=1, heads=2, kv_heads=2, width=3, value_width=2, causal=causal, grad=True)
    leaves = [inputs.query, inputs.key, inputs.value]
    vectors = [torch.randn_like(leaf) for leaf in leaves]
    products = []
    for output in (method.attend(inputs).output, method.reference(inputs)):
        grads = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        slope = sum((grad * vector).sum() for grad, vector in zip(grads, vectors, strict=True))
        products.append(torch.autograd.grad(slope, leaves))
    for got, wanted in zip(*products, strict=True):
        assert_same(got, wanted, 1e-9)
