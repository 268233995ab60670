"""Twice the tokens, twice the memory: of every kind of statistic, and for a sparse method."""

from __future__ import annotations

from pathlib import Path

import pytest

from longlens.testing import peak_growths
from longlens.testing.memory import LINEAR


@pytest.mark.memory
@pytest.mark.parametrize(
    "case",
    [
        {"name": "rows"},
        {"name": "columns"},
        {"name": "maps"},
        {"name": "rows", "is_causal": True},
        {"name": "columns", "method": "window:64"},
        {"name": "rollout"},
    ],
    ids=str,
)
def test_growth(case):
    here = str(Path(__file__).parent)
    cases = [{**case, "length": length} for length in (4096, 8192)]
    small, large = peak_growths("scan_pass:scan_pass", cases, path=[here], warm_up={**case, "length": 256}, runs=1)
    assert large <= LINEAR * small
    # and far from the matrix of one head
    assert large < 4 * 8192**2 / 4
