"""Collectors where numbers repeat, are missing, or round."""

from __future__ import annotations

import pytest
import torch

import longlens
from longlens.lens.collect.maps import Cells, WeightHistogram
from longlens.lens.collect.rows import EffectiveKeys, Entropy


def test_cells_named_twice_are_given_twice():
    query, key = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    whole = longlens.scan(query, key, collect=[Cells(queries=tuple(range(9)))])["cells"].values
    cells = longlens.scan(query, key, collect=[Cells(queries=(3, 3, 1), keys=(5, 0, 5))])["cells"].values
    assert torch.equal(cells, whole[:, :, [3, 3, 1]][..., [5, 0, 5]])


def test_a_histogram_of_weights_takes_a_query_that_is_no_number():
    query, key = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    query[0, 1, 2] = torch.nan
    histogram = longlens.scan(query, key, collect=[WeightHistogram()])["weight_histogram"]
    assert histogram.count.sum(-1).tolist() == [[81.0, 81.0]]
    assert histogram.mass[0, 0].isfinite().all()
    assert histogram.mass[0, 1, 0].isnan()


@pytest.mark.parametrize("scale", [20.0, 300.0])
def test_entropy_of_nearly_one_hot_rows_is_not_below_0(scale):
    query, key = torch.randn(1, 4, 200, 16), torch.randn(1, 4, 200, 16)
    seen = longlens.scan(query, key, collect=[Entropy(), EffectiveKeys()], method="window:16|dilated:8,5", scale=scale)
    assert (seen["entropy"].values >= 0).all()
    assert (seen["effective_keys"].values >= 1).all()


@pytest.mark.parametrize(("method", "error"), [("exact", 5e-4), ("window:32|dilated:32,3", 3e-3)])
def test_entropy_at_scores_of_thousands_is_within_what_the_page_says(method, error):
    query, key = torch.randn(1, 2, 200, 16), torch.randn(1, 2, 200, 16)
    arguments = {"collect": [Entropy()], "method": method, "scale": 300.0}
    single = longlens.scan(query, key, **arguments)["entropy"].values
    double = longlens.scan(query.double(), key.double(), **arguments)["entropy"].values
    assert double.dtype == torch.float64
    assert (single.double() - double).abs().max() <= error
