"""Packed sequences in a batch: boundaries count along the rows laid end to end."""

from __future__ import annotations

import pytest
import torch

import longlens
from longlens.lens import Entropy, Received, TopKeys

BOUNDS = ((0, 5, 12), (0, 1, 9, 12))


@pytest.mark.parametrize("method", ["exact", "window:2", "lsh:2,bucket=2", "linear"])
def test_each_row_is_packed_by_itself(method):
    tensors = [torch.randn(2, heads, 12, 8, requires_grad=True) for heads in (4, 2, 2)]
    keep = torch.rand(2, 12) > 0.2
    whole = torch.tensor([*BOUNDS[0], *(12 + bound for bound in BOUNDS[1][1:])], dtype=torch.int32)
    more = {"method": method, "scale": 0.7}
    found = longlens.attention(*tensors, cu_seqlens=whole, key_mask=keep, **more)
    rows = [
        longlens.attention(
            *(tensor[row : row + 1] for tensor in tensors), key_mask=keep[row : row + 1],
            cu_seqlens=torch.tensor(BOUNDS[row], dtype=torch.int32), **more,
        )
        for row in (0, 1)
    ]  # fmt: skip
    expected = torch.cat(rows)
    torch.testing.assert_close(found, expected)
    slope = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, tensors, slope), torch.autograd.grad(expected, tensors, slope), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", ["exact", "longformer:1,global_tokens=(0,)"])
def test_the_scan_sees_what_was_attended(method):
    query, key, value = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    whole = torch.tensor([*BOUNDS[0], *(12 + bound for bound in BOUNDS[1][1:])], dtype=torch.int32)
    given = {"cu_seqlens": whole, "method": method, "is_causal": True}
    output = longlens.attention(query, key, value, **given)
    collect = [Entropy(), Received(), TopKeys(2)]
    # the scan itself checks that its weights give this output
    found = longlens.scan(query, key, collect=collect, value=value, output=output, **given)
    for row in (0, 1):
        bounds = torch.tensor(BOUNDS[row], dtype=torch.int32)
        own = slice(row, row + 1)
        alone = longlens.scan(query[own], key[own], collect=collect, **(given | {"cu_seqlens": bounds}))
        torch.testing.assert_close(found["entropy"].values[own], alone["entropy"].values)
        torch.testing.assert_close(found["received"].values[own], alone["received"].values)
        assert torch.equal(found["top_keys"].index[own], alone["top_keys"].index)
