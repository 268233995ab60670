"""Training adapters takes memory linear in the protein's length, and at most what is predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapting_pass import CONFIGS

from longlens.jobs.plan import training_bytes
from longlens.testing.memory import LINEAR, peak_growths


@pytest.mark.memory
@pytest.mark.parametrize("family", CONFIGS)
def test_memory_of_a_training_step_is_linear_in_the_length_and_at_most_what_is_predicted(family):
    lengths = [1024, 2048]
    here = str(Path(__file__).parent)
    one, two = peak_growths(
        "adapting_pass:adapting_pass", [{"family": family, "length": length} for length in lengths], path=[here],
        warm_up={"family": family, "length": 64}, runs=1,
    )  # fmt: skip
    assert 1.4 < two / one <= LINEAR
    for length, growth in zip(lengths, (one, two), strict=True):
        # the prediction is that of an ordinary process, which returns freed memory later than the measured one
        assert 0.2 < growth / training_bytes(CONFIGS[family], length + 2) < 1.0
