"""Padding costs an attached model no N x N mask."""

from __future__ import annotations

from pathlib import Path

import pytest

from longlens.testing import peak_growths


@pytest.mark.memory
def test_a_padded_batch_of_16384_tokens_takes_no_more_than_twice_an_unpadded_one():
    here = str(Path(__file__).parent)
    cases = [
        {"length": 16_384, "padded": 0, "attached": False},
        {"length": 16_384, "padded": 16, "attached": True},
    ]
    warm_up = {"length": 64, "padded": 4, "attached": True}
    plain, padded = peak_growths("bert_pass:bert_pass", cases, path=[here], warm_up=warm_up, runs=1)
    print(f"unpadded sdpa {plain / 2**20:.1f} MiB, 16 padded and attached {padded / 2**20:.1f} MiB")
    assert padded <= 2 * plain
