"""The settings of conftest.py are in force."""

from __future__ import annotations

import torch


def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(7).isnan().all()
    assert torch.empty_like(torch.zeros(3, 2)).isnan().all()
    assert torch.zeros(1).new_empty(5, dtype=torch.bfloat16).isnan().all()


def test_seed_does_not_depend_on_the_suite() -> None:
    drawn = torch.randint(2**31, ()).item()
    torch.manual_seed(torch.initial_seed())
    assert torch.randint(2**31, ()).item() == drawn
