"""Surprise by its formulas."""

from __future__ import annotations

import pytest
import torch

from longlens.errors import InputError
from longlens.lens.predict.surprise import surprise


def test_formulas_in_float64():
    logits = torch.randn(40, 33, dtype=torch.float64) * 4
    truth = torch.randint(33, (40,))
    p = logits.softmax(-1)
    found = surprise(p.log().float(), truth)
    error = torch.stack([-p[i, t].log() for i, t in enumerate(truth)])
    entropy = -(p * p.log()).sum(1)
    for ours, wanted in ((found.surprise, error), (found.entropy, entropy), (found.excess, error - entropy)):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)
    assert found.rank.tolist() == [1 + int((row > row[t]).sum()) for row, t in zip(p, truth, strict=True)]


def test_certain_and_impossible_tokens():
    log_p = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]])
    found = surprise(log_p, torch.tensor([0, 1]))
    assert found.surprise.tolist() == [0.0, torch.inf]
    assert found.entropy.tolist() == [0.0, 0.0]
    assert found.rank.tolist() == [1, 2]


def test_wrong_shapes_are_named():
    with pytest.raises(InputError, match=r"got \(3, 5\) and \(4,\)"):
        surprise(torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64))
