"""The suite catches what it is meant to catch: attention functions broken on purpose, one defect each.

`attend` below is right and passes everything. Each mutant changes one thing, and the set of checks that fail is stated:
the one meant for the defect, and those that the defect cannot but touch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from longlens.testing import Claims, check_names, claims_of, run_conformance, run_method
from longlens.testing.conformance import CHECKS, MEMORY_CHECKS

NO_MEMORY = [name for name in check_names() if name not in MEMORY_CHECKS]

CLAIMS = Claims(
    key_mask="key_mask",
    attn_mask=True,
    packing="cu_seqlens",
    grouped=True,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    lengths=(1, 63),
    second_derivatives=True,
    dropout=True,
    lse="return_lse",
    softcap=True,
    sinks=True,
)
# without a definition only what must not matter is checked, so that one defect fails one check
LOOSE = replace(CLAIMS, kind="approximate", lse=None)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    broken: str = "",
) -> Any:
    """Softmax attention done right in float32 or wider, unless `broken` says where not."""
    if cu_seqlens is not None and broken != "pack neighbours":
        given = {"is_causal": is_causal, "scale": scale, "softcap": softcap, "sinks": sinks}
        bounds = cu_seqlens.tolist()
        parts = [
            attend(*(t[:, :, a:b] for t in (query, key, value)), broken=broken, **given) for a, b in pairwise(bounds)
        ]
        return torch.cat(parts, 2)
    dtype, groups = query.dtype, query.shape[1] // key.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    if broken == "low precision" and wide == torch.float32:
        wide = torch.bfloat16
    repeat = _tile if broken == "group order" else torch.Tensor.repeat_interleave
    q, k, v = query.to(wide), repeat(key, groups, 1).to(wide), repeat(value, groups, 1).to(wide)
    nq, nk = q.shape[2], k.shape[2]
    keep = _kept(attn_mask, key_mask, q, k, is_causal, broken)
    if broken != "NaN leak":
        seen = keep.any(2).unsqueeze(-1)
        k, v = k.where(seen, 0.0), v.where(seen, 0.0)
    bad = ~(torch.isfinite(k).all(-1) & torch.isfinite(v).all(-1))[:, :, None, :]
    if broken != "NaN leak":
        k_bad = (keep & bad).any(-1, keepdim=True)
        k, v = (tensor.where(~bad.transpose(2, 3), 0.0) for tensor in (k, v))
    scores = q @ k.transpose(2, 3) * _scale(q, scale, broken)
    if softcap is not None:
        capped = softcap * torch.tanh(scores / softcap)
        # a backward pass that forgets the cap
        scores = scores + (capped - scores).detach() if broken == "cap without slope" else capped
    scores = scores.masked_fill(~keep, -torch.inf)
    empty = ~keep.any(-1, keepdim=True)
    if broken == "uniform empty rows":
        scores = scores.masked_fill(empty, 0.0)
    if sinks is not None:
        column = sinks.to(wide).view(1, -1, 1, 1).masked_fill(empty, -torch.inf)
        scores = torch.cat([scores, column.detach() if broken == "sinks without gradient" else column], -1)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min).detach()
    if broken == "no stabiliser":
        top = torch.zeros_like(top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    lse = (total.log() + top).squeeze(-1)
    weights = weights[..., :nk] / total.clamp(min=torch.finfo(wide).tiny)
    if broken == "eps in the sum":
        weights = weights * (total / (total + 1e-3))
    if dropout_p:
        kept = torch.rand(weights.shape, device=q.device) >= dropout_p
        weights = weights * kept / (1.0 if broken == "biased dropout" else 1 - dropout_p)
    out = weights @ v
    if broken != "NaN leak":
        out = out.masked_fill(k_bad, torch.nan)
    out = _broken(broken, out, q, nq, nk).to(dtype)
    if return_lse:
        return out, lse / 0.6931 if broken == "lse in base 2" else lse
    return out


def _tile(tensor: Tensor, groups: int, axis: int) -> Tensor:
    return torch.cat([tensor] * groups, axis)


def _scale(query: Tensor, scale: float | None, broken: str) -> float:
    usual = query.shape[3] ** -0.5
    return usual if scale is None or broken == "scale ignored" else scale


def _kept(
    attn_mask: Tensor | None, key_mask: Tensor | None, q: Tensor, k: Tensor, is_causal: bool, broken: str
) -> Tensor:
    nq, nk = q.shape[2], k.shape[2]
    keep = torch.ones(q.shape[0], q.shape[1], nq, nk, dtype=torch.bool)
    if is_causal:
        shift = {"top-left causal": 0, "sees one ahead": nk - nq + 1}.get(broken, nk - nq)
        keep = keep.tril(shift)
    if attn_mask is not None:
        keep = keep & (~attn_mask if broken == "mask inverted" else attn_mask)
    if key_mask is not None and broken != "key mask ignored":
        keep = keep & key_mask[:, None, None, :]
    return keep


class _WrongGradient(torch.autograd.Function):
    """The identity, with a gradient that is off by a hundredth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 1.01 * grads[0]


def _broken(broken: str, out: Tensor, q: Tensor, nq: int, nk: int) -> Tensor:
    if broken == "rows coupled":
        return out * (1 + 1e-6 * q[:, :, :1].abs().amax())
    if broken == "length in the result":
        return out * (1 + 1e-6 * nk)
    if broken == "not repeatable":
        return out * (1 + 1e-15 * torch.randn_like(out))
    if broken == "wrong gradient":
        return _WrongGradient.apply(out)
    if broken == "odd last row":
        return torch.cat([out[:, :, : nq // 2 * 2], out[:, :, nq // 2 * 2 :] * 0.5], 2)
    if broken == "strides assumed" and not q.is_contiguous():
        return out + 1e-3
    return out


def mutant(broken: str) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return attend(*args, **kwargs, broken=broken)

    return function


def failures(broken: str, claims: Claims) -> set[str]:
    report = run_conformance(mutant(broken), claims=claims, checks=NO_MEMORY)
    return {result.check for result in report.failures}


def test_what_is_right_passes() -> None:
    report = run_conformance(attend, claims=CLAIMS, checks=NO_MEMORY)
    assert report.ok, report.table()
    assert {result.status for result in report.results} == {"pass"}


VALUES = {"agreement", "odd lengths", "cross lengths", "scale", "dtypes", "gradients"}

# these judge output and gradients, packed sequences among them
SCORES = {"softcap", "sinks"}

MUTANTS = [
    ("sees one ahead", LOOSE, {"causality", "masked NaN", "fully masked rows"}),
    ("key mask ignored", LOOSE, {"padding left", "padding right", "fully masked rows", "masked NaN"}),
    ("NaN leak", CLAIMS, {"masked NaN"}),
    ("top-left causal", CLAIMS, {"cross lengths", "fully masked rows"}),
    ("mask inverted", CLAIMS, {"tensor mask", "fully masked rows"}),
    ("pack neighbours", CLAIMS, {"packing"} | SCORES),
    ("scale ignored", CLAIMS, {"scale"}),
    ("rows coupled", LOOSE, {"batch", "padding left", "padding right", "fully masked rows", "masked NaN"}),
    ("not repeatable", LOOSE, {"determinism"}),
    ("strides assumed", CLAIMS, {"layouts", "padding left", "padding right"} | SCORES),
    ("odd last row", CLAIMS, {"odd lengths", "cross lengths", "padding left", "padding right"}),
    ("group order", CLAIMS, {"grouped heads"}),
    ("biased dropout", CLAIMS, {"dropout"}),
    ("lse in base 2", CLAIMS, {"log-sum-exp", "sinks"}),
    ("cap without slope", CLAIMS, {"softcap"}),
    ("sinks without gradient", CLAIMS, {"sinks"}),
    ("wrong gradient", CLAIMS, {"gradients", "dropout"} | SCORES),
    ("uniform empty rows", CLAIMS, {"fully masked rows", "cross lengths"}),
    ("no stabiliser", CLAIMS, {"agreement"}),
    ("low precision", CLAIMS, {"dtypes", "gradients"}),
    ("eps in the sum", CLAIMS, VALUES | {"tensor mask"} | SCORES),
    ("length in the result", LOOSE, {"padding left", "padding right"}),
]


@pytest.mark.parametrize(("broken", "claims", "expected"), MUTANTS, ids=[name for name, *_ in MUTANTS])
def test_a_broken_function_fails_the_check_meant_for_it(broken: str, claims: Claims, expected: set[str]) -> None:
    assert failures(broken, claims) == expected


def test_every_check_catches_something() -> None:
    caught = set().union(*(expected for *_, expected in MUTANTS))
    elsewhere = {"value width", "second derivatives"}
    assert {check.name for check in CHECKS} == caught | elsewhere


def test_value_width() -> None:
    def narrow(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return attend(query, key, value, **kwargs)[..., : query.shape[3]]

    report = run_conformance(narrow, claims=CLAIMS, checks=["value width"])
    assert "expected output (2, 4, 64, 40), got (2, 4, 64, 16)" in report["value width"].describe()


class _WrongSecond(torch.autograd.Function):
    """The identity, whose gradient hides from the second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * 2 * x.detach()


def test_second_derivatives() -> None:
    def hidden(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return attend(_WrongSecond.apply(query), key, value, **kwargs)

    claims = replace(CLAIMS, kind="approximate")
    report = run_conformance(hidden, claims=claims, checks=["gradients", "second derivatives"])
    assert {result.check for result in report.failures} == {"second derivatives"}


def quadratic(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """A quadratic function that calls itself linear; at module level, so that a fresh process finds it."""
    return attend(query, key, value, is_causal=is_causal)


@pytest.mark.memory
def test_quadratic_memory() -> None:
    report = run_conformance(quadratic, claims=Claims(memory="N"), checks=MEMORY_CHECKS, memory_lengths=(512, 1024))
    assert {result.status for result in report.results} == {"fail"}, report.table()
    assert "expected at most 2.1 times, got 3." in report["memory forward"].describe(), report.table()


def test_memory_of_what_cannot_be_imported_is_not_run() -> None:
    report = run_conformance(mutant(""), claims=Claims(memory="N"), checks=["memory forward"])
    assert report["memory forward"].status == "not run"
    assert "target=" in report["memory forward"].describe()


def test_an_exception_is_a_failure() -> None:
    def raises(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    report = run_conformance(raises, claims=CLAIMS, checks=["agreement"])
    assert not report.ok
    assert report["agreement"].describe() == "raised RuntimeError: no such kernel"


def test_a_wrong_dtype_is_a_failure() -> None:
    def widened(*args: Any, **kwargs: Any) -> Tensor:
        return attend(*args, **kwargs).double()

    report = run_conformance(widened, claims=Claims(), checks=["dtypes"])
    assert "expected output in torch.float32, got torch.float64" in report["dtypes"].describe()


def test_torch_shows_its_true_state() -> None:
    """PyTorch's own function: causal from the top left, and NaN from behind a mask."""
    function = torch.nn.functional.scaled_dot_product_attention
    claims = Claims(key_mask="attn_mask", key_mask_shape="B11N", masks_with_causal=False, grouped=False)
    report = run_conformance(function, claims=claims, checks=NO_MEMORY)
    assert {result.check for result in report.failures} == {"cross lengths", "fully masked rows", "masked NaN"}
    top_left = run_conformance(function, claims=replace(claims, causal="top-left"), checks=["cross lengths"])
    assert top_left.ok, top_left.table()


def test_a_wrong_definition_is_caught() -> None:
    """Agreement is with the definition given, not with whatever the function does."""
    claims = replace(claims_of("window:16"), definition=claims_of("window:15").definition)
    from longlens import attention

    assert not run_conformance(attention, claims=claims, checks=["agreement"]).ok
    assert run_method("window:16", checks=["agreement"]).ok
