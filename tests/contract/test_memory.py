"""Peak memory grows with the length, not with its square: every method that declares it, forward and backward."""

from __future__ import annotations

import pytest

import longlens
from longlens import BlockSparse, CosFormer
from longlens.ops.method import Method
from longlens.testing import claims_of, peak_growths
from longlens.testing.conformance import MEMORY_LENGTHS, memory_finding
from methods import METHODS, band

# parameters that must reach over the length
LONG: dict[str, Method] = {"blocksparse": BlockSparse(band(128), 128), "cosformer": CosFormer(16384)}
# slow methods with much memory for each token, which is measured well at half the length
SLOW = {"exact", "fixed", "scatterbrain", "taylor"}
LINEAR_METHODS = [LONG.get(method.name, method) for method in METHODS if claims_of(method).memory == "N"]


@pytest.mark.memory
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("method", LINEAR_METHODS, ids=lambda method: str(method)[:40])
def test_growth_is_linear(method: Method, backward: bool) -> None:
    # causal forms of patterns run through the same tiles
    lengths = (MEMORY_LENGTHS[0] // 2, MEMORY_LENGTHS[1] // 2) if method.name in SLOW else MEMORY_LENGTHS
    modes = [False, True] if claims_of(method).kind == "approximate" and claims_of(method).causal else [False]
    cases = [
        {
            "function": "longlens:attention",
            "length": length,
            "heads": 1 if method.name == "exact" else 2,
            "width": 32,
            "causal": causal,
            "backward": backward,
            "keywords": {"method": str(method)},
        }
        for causal in modes
        for length in lengths
    ]
    growth = peak_growths("longlens.testing.memory:attention_call", cases, warm_up={"length": 128}, runs=1)
    for place, causal in enumerate(modes):
        mode = "causal" if causal else "bidirectional"
        finding = memory_finding(f"{method}, {mode}", lengths, growth[2 * place : 2 * place + 2])
        assert finding.ok, finding


@pytest.mark.memory
@pytest.mark.parametrize("method", ["exact", "window:64", "bigbird:64,2", "window:64|dilated:32,70"])
def test_growth_is_linear_with_capped_scores_and_sinks(method: str) -> None:
    lengths = (4096, 8192) if method == "exact" else MEMORY_LENGTHS
    for backward in (False, True):
        case = {
            "function": "longlens:attention",
            "heads": 1,
            "width": 32,
            "backward": backward,
            "sinks": True,
            "keywords": {"method": method, "softcap": 5.0},
        }
        cases = [case | {"length": length} for length in lengths]
        growth = peak_growths("longlens.testing.memory:attention_call", cases, warm_up={"length": 128}, runs=1)
        finding = memory_finding(f"{method}, backward {backward}", lengths, growth)
        assert finding.ok, finding
        predicted = longlens.explain(
            (1, 1, lengths[1], 32), method=method, softcap=5.0, sinks=True, requires_grad=backward
        ).peak_bytes
        assert growth[1] <= 1.25 * predicted, (growth, predicted)
