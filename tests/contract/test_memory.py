"""Peak memory grows with the length, not with its square: every method that declares it, forward and backward."""

from __future__ import annotations

import pytest

from longlens import BlockSparse
from longlens.ops.method import Method
from longlens.testing import claims_of, peak_growths
from longlens.testing.conformance import MEMORY_LENGTHS, memory_finding
from methods import METHODS, band

# a layout must reach over the length
LONG = [BlockSparse(band(128), 128) if method.name == "blocksparse" else method for method in METHODS]
LINEAR_METHODS = [method for method in LONG if claims_of(method).memory == "N"]


@pytest.mark.memory
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("method", LINEAR_METHODS, ids=lambda method: str(method)[:40])
def test_growth_is_linear(method: Method, backward: bool) -> None:
    modes = [False] if claims_of(method).causal is None or method.name == "exact" else [False, True]
    cases = [
        {
            "function": "longlens:attention",
            "length": length,
            "heads": 2,
            "width": 32,
            "causal": causal,
            "backward": backward,
            "keywords": {"method": str(method)},
        }
        for causal in modes
        for length in MEMORY_LENGTHS
    ]
    growth = peak_growths("longlens.testing.memory:attention_call", cases, warm_up={"length": 128}, runs=1)
    for place, causal in enumerate(modes):
        mode = "causal" if causal else "bidirectional"
        finding = memory_finding(f"{method}, {mode}", MEMORY_LENGTHS, growth[2 * place : 2 * place + 2])
        assert finding.ok, finding
