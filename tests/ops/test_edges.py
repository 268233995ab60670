"""Arguments at the edge of what is allowed."""

from __future__ import annotations

import pytest
import torch

import longlens as ll
from longlens.errors import InputError


def test_a_scale_whose_gradient_would_be_lost_is_refused():
    query = torch.randn(1, 1, 6, 4)
    with pytest.raises(InputError, match="multiply the query"):
        ll.attention(query, query, query, scale=torch.tensor(0.5, requires_grad=True))
    want = ll.attention(query, query, query, scale=0.5)
    assert torch.equal(ll.attention(query, query, query, scale=torch.tensor(0.5)), want)


@pytest.mark.parametrize("method", ["exact", "window:8", "lsh:2,8"])
def test_dropout_near_1_still_keeps_a_few(method):
    query = torch.randn(1, 1, 64, 4, requires_grad=True)
    output = ll.attention(query, query, query, dropout_p=1 - 1e-9, method=method)
    output.sum().backward()
    assert output.isfinite().all()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("method", ["exact", "window:8", "linear", "lsh:2,8", "exact:flex", "performer:16"])
def test_meta_tensors_give_shapes(method):
    query = torch.empty(2, 4, 20, 16, device="meta", dtype=torch.bfloat16)
    value = torch.empty(2, 2, 20, 16, device="meta", dtype=torch.bfloat16)
    output = ll.attention(query, value, value, method=method)
    assert output.shape == (2, 4, 20, 16)
    assert output.is_meta
    assert output.dtype == torch.bfloat16
