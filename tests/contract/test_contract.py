"""Every method passes every check of what it declares, and refuses the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import longlens
from longlens.errors import UnsupportedError
from longlens.ops.method import Method
from longlens.ops.registry import BY_NAME, METHOD_INFOS
from longlens.testing import check_names, claims_of, run_method
from longlens.testing.conformance import MEMORY_CHECKS
from methods import METHODS

CHECKS = [name for name in check_names() if name not in MEMORY_CHECKS]

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method)[:40])


def test_every_registered_method_is_in_the_list() -> None:
    assert {entry.name for entry in METHOD_INFOS} <= {method.name for method in METHODS}


@every_method
@pytest.mark.parametrize("check", CHECKS)
def test_method_passes(method: Method, check: str) -> None:
    report = run_method(method, checks=[check])
    assert report.ok, report.table()


@every_method
def test_every_method_claims_the_common_ground(method: Method) -> None:
    """Padding, packing, grouped heads, every dtype, gradients, linear memory: no method may go without."""
    claims = claims_of(method)
    assert claims.key_mask
    assert claims.packing
    assert claims.grouped
    assert claims.gradients
    assert claims.memory == "N"
    assert set(claims.dtypes) == {"float32", "bfloat16", "float16", "float64"}


REQUESTS: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"is_causal": True},
    "masks": lambda: {"attn_mask": torch.ones(8, 8, dtype=torch.bool)},
    "bias": lambda: {"bias": longlens.Alibi(2)},
    "dropout": lambda: {"dropout_p": 0.1},
    "lse": lambda: {"return_lse": True},
    "softcap": lambda: {"softcap": 2.0},
    "sinks": lambda: {"sinks": torch.zeros(2)},
}
REFUSED = [
    pytest.param(method, ability, id=f"{method}-{ability}")
    for method in METHODS
    if method.name in BY_NAME
    for ability in REQUESTS
    if not getattr(BY_NAME[method.name], ability)
]


@pytest.mark.parametrize(("method", "ability"), REFUSED)
def test_what_is_not_declared_is_refused(method: Method, ability: str) -> None:
    tensor = torch.randn(1, 2, 8, 4)
    with pytest.raises(UnsupportedError, match="methods that can"):
        longlens.attention(tensor, tensor, tensor, method=method, **REQUESTS[ability]())


FIRST_ONLY = [method for method in METHODS if not claims_of(method).second_derivatives]


@pytest.mark.parametrize("method", FIRST_ONLY, ids=lambda method: str(method)[:40])
def test_second_derivatives_that_are_not_declared_are_refused(method: Method) -> None:
    query, key, value = (torch.randn(1, 2, 12, 4, requires_grad=True) for _ in range(3))
    out = longlens.attention(query, key, value, method=method)
    gradients = torch.autograd.grad(out.square().sum(), (query, key, value), create_graph=True)
    with pytest.raises((RuntimeError, UnsupportedError)):
        torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), (query, key, value))
