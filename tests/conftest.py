"""Settings for every test: a seed of its own, one thread, and uninitialised memory that shows itself."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# benchmarks are programs beside the package: their folder goes onto the path, as it does when one of them is run,
# behind everything else, since names such as "lens" or "contacts" are short
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))


def pytest_configure() -> None:
    # tensors here are small: threads spend their time waiting for each other, in this process and those that it starts
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a time limit of their own are the longest: they start first, so that no process waits for one."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """A seed that depends on the test's name alone, so that a test gives the same numbers alone and in the suite."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN (the largest value for integers), so that a read of it cannot pass.

    PyTorch does that under deterministic algorithms. Tests on a GPU, where some kernels have no deterministic form, run
    without.
    """
    if request.node.get_closest_marker("cuda"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
