"""Training adapters takes memory linear in the protein's length, and at most what is predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapting_pass import CONFIGS

from longlens.jobs.plan import training_bytes
from longlens.testing.memory import LINEAR, peak_growths

LENGTHS = (512, 1024)


@pytest.fixture(scope="module")
def growths():
    """Peak growth of a step by family and length, of one fresh process."""
    cases = [{"family": family, "length": length} for family in CONFIGS for length in LENGTHS]
    found = peak_growths("adapting_pass:adapting_pass", cases, path=[str(Path(__file__).parent)],
                         warm_up={"family": "ESM-2", "length": 64}, runs=1)  # fmt: skip
    return {(case["family"], case["length"]): growth for case, growth in zip(cases, found, strict=True)}


@pytest.mark.memory
@pytest.mark.parametrize("family", CONFIGS)
def test_memory_of_a_training_step_is_linear_in_the_length_and_at_most_what_is_predicted(family, growths):
    one, two = (growths[family, length] for length in LENGTHS)
    assert 1.4 < two / one <= LINEAR
    for length, growth in zip(LENGTHS, (one, two), strict=True):
        # the prediction is that of an ordinary process, which returns freed memory later than the measured one
        assert 0.2 < growth / training_bytes(CONFIGS[family], length + 2) < 1.0
