"""What may not reach a row: the future, padding, the rest of the batch, other sequences, the device's rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from approximators import CAUSAL, MODE_NAMES, MODES, assert_same, cast, error, make

import longlens
from longlens.ops.method import Method

modes = pytest.mark.parametrize(("method", "causal"), MODES, ids=MODE_NAMES)


@pytest.mark.parametrize("method", CAUSAL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [-1.0, 1e3])
@pytest.mark.parametrize("place", [255, 259])
def test_the_future_changes_no_bit(method: Method, dtype: torch.dtype, factor: float, place: int) -> None:
    inputs = make(260, dtype=dtype, causal=True)
    key, value = inputs.key.clone(), inputs.value.clone()
    key[:, :, place] *= factor
    value[:, :, place] *= factor
    before, after = (method.attend(i).output for i in (inputs, replace(inputs, key=key, value=value)))
    assert torch.equal(before[:, :, :place], after[:, :, :place])
    assert not torch.equal(before[:, :, place:], after[:, :, place:])


@modes
def test_padding_of_nan_changes_nothing(method: Method, causal: bool) -> None:
    inputs = make(100, causal=causal)
    left, right = 20, 9
    pads = [torch.nn.functional.pad(t, (0, 0, left, right), value=torch.nan) for t in (inputs.key, inputs.value)]
    query = torch.nn.functional.pad(inputs.query, (0, 0, left, right), value=0.5)
    key_mask = torch.zeros(2, 100 + left + right, dtype=torch.bool)
    key_mask[:, left : left + 100] = True
    output = longlens.attention(query, *pads, is_causal=causal, method=method, key_mask=key_mask)
    assert output.isfinite().all()
    assert_same(output[:, :, left : left + 100], method.attend(inputs).output, 1e-12)


@modes
def test_packing_is_running_apart(method: Method, causal: bool) -> None:
    inputs = make(230, batch=1, causal=causal)
    bounds = torch.tensor([0, 1, 64, 64, 230], dtype=torch.int32)
    packed = longlens.attention(
        inputs.query, inputs.key, inputs.value, is_causal=causal, method=method, cu_seqlens=bounds
    )
    for a, b in ((0, 1), (1, 64), (64, 230)):
        parts = [t[:, :, a:b] for t in (inputs.query, inputs.key, inputs.value)]
        assert_same(packed[:, :, a:b], longlens.attention(*parts, is_causal=causal, method=method))


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 64])
def test_error_at_most_twice_a_plain_one(method: Method, causal: bool, dtype: torch.dtype, width: int) -> None:
    inputs = make(500, width=width, value_width=width, dtype=dtype, causal=causal)
    exact = method.reference(cast(inputs, torch.float64))
    plain = error(method.reference(inputs), exact)
    if dtype == torch.float16 and math.isnan(plain):
        # the definition has no stabiliser and overflows; ours must still be right to the last place or two
        plain = torch.finfo(dtype).eps / 2
    assert error(method.attend(inputs).output, exact) <= 2 * plain


@modes
def test_no_key_gives_zeros_and_no_gradient(method: Method, causal: bool) -> None:
    key_mask = torch.ones(2, 130, dtype=torch.bool)
    key_mask[1] = False
    inputs = make(causal=causal, key_mask=key_mask, grad=True)
    output = method.attend(inputs).output
    assert not output[1].any()
    assert output[0].any()
    for grad in torch.autograd.grad(output.sum(), [inputs.query, inputs.key, inputs.value]):
        assert not grad[1].any()
        assert grad.isfinite().all()


@modes
def test_no_key_at_all_is_still_differentiable(method: Method, causal: bool) -> None:
    inputs = make(causal=causal, key_mask=torch.zeros(2, 130, dtype=torch.bool), grad=True)
    output = method.attend(inputs).output
    assert not output.any()
    for grad in torch.autograd.grad(output.sum(), [inputs.query, inputs.key, inputs.value]):
        assert not grad.any()


@modes
def test_scratch_is_predicted(method: Method, causal: bool) -> None:
    small, large = (method.peak_elements(make(n, batch=1, causal=causal)) for n in (2**12, 2**13))
    assert 0 < small <= large <= 2.1 * small
