"""A NaN or infinity behind a mask never reaches an output; one in sight does."""

from __future__ import annotations

import pytest
import torch

import longlens as ll
from longlens.ops import nonfinite as guard

METHODS = [
    "exact",
    "exact:blockwise",
    "window:8",
    "strided:6",
    "bigbird:8,1",
    "longformer:8",
    "lsh:2,8",
    "linear",
    "performer:32",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_behind_a_key_mask(method, bad):
    query, key, value = (torch.randn(2, 2, 40, 8) for _ in range(3))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 30:] = False
    clean = ll.attention(query, key, value, method=method, key_mask=mask)
    key[0, :, 33], value[0, :, 35] = bad, bad
    assert torch.equal(ll.attention(query, key, value, method=method, key_mask=mask), clean)


@pytest.mark.parametrize("method", METHODS)
def test_behind_a_causal_mask(method):
    query, key, value = (torch.randn(2, 2, 40, 8) for _ in range(3))
    clean = ll.attention(query, key, value, method=method, is_causal=True)
    value[0, 1, 25] = torch.nan
    output = ll.attention(query, key, value, method=method, is_causal=True)
    torch.testing.assert_close(output[:, :, :25], clean[:, :, :25])
    torch.testing.assert_close(output[1], clean[1])
    # head 0 has keys of its own; the query at the bad key sees it
    torch.testing.assert_close(output[0, 0], clean[0, 0])
    assert output[0, 1, 25].isnan().all()


def test_outside_a_window_and_inside():
    query, key, value = (torch.randn(1, 2, 40, 8) for _ in range(3))
    clean = ll.attention(query, key, value, method="window:4")
    key[:, :, 20] = torch.nan
    output, lse = ll.attention(query, key, value, method="window:4", return_lse=True)
    inside = (torch.arange(40) - 20).abs() <= 4
    assert output[:, :, inside].isnan().all()
    assert lse[:, :, inside].isnan().all()
    torch.testing.assert_close(output[:, :, ~inside], clean[:, :, ~inside])


def test_gradients_stay_finite():
    query, key, value = (torch.randn(1, 1, 12, 4) for _ in range(3))
    value[:, :, 7] = torch.nan
    mask = torch.arange(12).unsqueeze(0) != 7
    for tensor in (query, key, value):
        tensor.requires_grad_()
    ll.attention(query, key, value, key_mask=mask).sum().backward()
    assert query.grad.isfinite().all()
    assert key.grad.isfinite().all()
    assert value.grad.isfinite().all()
    assert not value.grad[:, :, 7].any()


def test_many_bad_keys_are_asked_about_in_parts(monkeypatch):
    query, key, value = (torch.randn(1, 2, 40, 8) for _ in range(3))
    key[:, :, 3:30] = torch.nan
    whole = ll.attention(query, key, value, method="window:2")
    monkeypatch.setattr(guard, "PAIRS", 7)
    torch.testing.assert_close(ll.attention(query, key, value, method="window:2"), whole, equal_nan=True)
    assert whole[:, :, 33:].isfinite().all()
    assert whole[:, :, 1:32].isnan().all()
