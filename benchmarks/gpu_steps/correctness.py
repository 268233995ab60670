"""Every method under every mask on the device, forward and gradients, against float64 on the CPU.

The reference is the same call in float64 on the CPU, which the tests hold to each method's definition. LSH and methods
that choose by comparing numbers may choose otherwise in another precision: their errors are recorded, not judged.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import longlens
from gpu_steps.setup import Setup, list_of_methods
from longlens.testing import claims_of, run_conformance

# relative Frobenius error that is accepted: a few times what plain implementations show
LIMITS = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
LENGTH, HEADS, WIDTH = 192, 4, 16
CHOOSES = ("lsh",)


def run(setup: Setup) -> None:
    """The step: forward and gradients; each method once in each dtype before the cases, the cases in float32 first."""
    for dtype in ("float32", "bfloat16"):
        setup.measure(f"alone as among others, {dtype}", lambda dtype=dtype: alone(setup, dtype))
    chosen = setup.pick(list_of_methods(), ["exact", "window:16", "linear"])
    dtypes = setup.pick(("float32", "bfloat16", "float16"), ("float32",))
    plan = [
        (place > 0, rank, place, method, case, keywords, dtype)
        for method in chosen
        for place, (case, keywords) in enumerate(cases(method))
        for rank, dtype in enumerate(dtypes)
    ]
    wanted: dict[str, dict[str, Tensor]] = {}
    with few_threads():
        for *_, method, case, keywords, dtype in sorted(plan, key=lambda entry: entry[:3]):

            def measure(
                method: str = method, case: str = case, keywords: dict[str, Any] = keywords, dtype: str = dtype
            ) -> dict[str, Any]:
                return errors(setup, method, keywords, dtype, wanted, f"{method}, {case}")

            setup.measure(f"{method}, {case}, {dtype}", measure)


@contextlib.contextmanager
def few_threads() -> Iterator[None]:
    """The references are small: many threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cases(method: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Masks that the method claims to serve; tensors are on the CPU, in float64 where they are numbers."""
    claims = claims_of(method)
    n = LENGTH
    generator = torch.Generator().manual_seed(5)
    yield "no mask", {}
    if claims.causal is not None:
        yield "causal", {"is_causal": True}
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[0, n - 50 :] = False
    keep[1, :30] = False
    yield "padding", {"key_mask": keep}
    if claims.packing is not None:
        yield "packed", {"cu_seqlens": torch.tensor([0, 1, 64, 129, n], dtype=torch.int32)}
    if claims.lse is not None:
        yield "log-sum-exp", {"return_lse": True}
    yield "grouped heads", {"key_heads": 2}
    yield "value width 24", {"value_width": 24}
    if claims.attn_mask:
        yield "tensor mask", {"attn_mask": torch.rand(2, 1, n, n, generator=generator) > 0.3}
        yield "window rule", {"attn_mask": longlens.Window(32)}
    if method == "exact":
        yield "rule and padding, causal", {"attn_mask": longlens.Prefix(20), "key_mask": keep, "is_causal": True}
        yield "ALiBi", {"bias": longlens.Alibi(HEADS)}
        yield "bias tensor", {"bias": torch.randn(1, HEADS, n, n, generator=generator, dtype=torch.float64)}
    taken = inspect.signature(longlens.attention).parameters
    if claims.kind != "approximate":
        if "softcap" in taken:
            yield "softcap", {"softcap": 3.0}
        if "sinks" in taken:
            yield "sinks", {"sinks": torch.randn(HEADS, generator=generator, dtype=torch.float64)}


def errors(
    setup: Setup, method: str, keywords: dict[str, Any], dtype: str, wanted: dict[str, dict[str, Tensor]], name: str
) -> dict[str, Any]:
    """Relative errors of output and gradients, and whether a second call gives the same bits.

    `wanted` keeps the float64 results by name: the numbers are the same in every dtype.
    """
    more = dict(keywords)
    key_heads, value_width = more.pop("key_heads", HEADS), more.pop("value_width", WIDTH)
    batch = 1 if "cu_seqlens" in more else 2
    shapes = ((HEADS, WIDTH), (key_heads, WIDTH), (key_heads, value_width))
    generator = torch.Generator().manual_seed(7)
    kind = getattr(torch, dtype)
    # whole 64ths of at most eight bits: the same numbers in every dtype
    drawn = [
        torch.randn(batch, heads, LENGTH, width, generator=generator, dtype=torch.float64) for heads, width in shapes
    ]
    tensors = [tensor.mul(64).round().clamp(-255, 255).div(64) for tensor in drawn]
    want = wanted.get(name)
    if want is None:
        want = wanted[name] = attend(method, tensors, more)
    there = [tensor.to(setup.device, kind) for tensor in tensors]
    moved = {name: move(value, setup.device, kind) for name, value in more.items()}
    got = attend(method, there, moved)
    again = attend(method, there, moved)
    apart = {f"error_{name}": relative(value, want[name]) for name, value in got.items()}
    judged = not method.startswith(CHOOSES)
    return {
        **apart, "same_bits": all(torch.equal(value, again[name]) for name, value in got.items()),
        "ok": all(value <= LIMITS[dtype] for value in apart.values()) if judged else None,
    }  # fmt: skip


def alone(setup: Setup, dtype: str) -> dict[str, Any]:
    """Sequences of a pack, each also by itself: does the company of others change bits?"""
    lengths = [1, 2, 63, 64, 65, 127, 128, 129, 300]
    query, key, value = (setup.draw(1, HEADS, sum(lengths), 32, dtype=dtype, seed=seed) for seed in (0, 1, 2))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(setup.device, torch.int32)
    together = longlens.attention(query, key, value, cu_seqlens=bounds)
    parts = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
    apart = torch.cat([longlens.attention(*part) for part in parts], 2)
    error = relative(together, apart)
    return {"same_bits": torch.equal(together, apart), "apart": error, "ok": error <= LIMITS[dtype]}


def move(value: Any, device: str, kind: torch.dtype) -> Any:
    """A mask or bias on the device; numbers in the dtype of the call."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, kind) if value.is_floating_point() else value.to(device)


def attend(method: str, tensors: list[Tensor], keywords: dict[str, Any]) -> dict[str, Tensor]:
    """Output, log-sum-exp and the gradients of a fixed weighting of the output."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    answer = longlens.attention(*leaves, method=method, **keywords)
    output, lse = answer if isinstance(answer, tuple) else (answer, None)
    # small halves are the same number in every dtype
    weight = torch.randint(-4, 5, output.shape, generator=torch.Generator().manual_seed(9)).to(output) / 2
    grads = torch.autograd.grad(output, leaves, weight, allow_unused=True)
    parts = dict(zip(("query_grad", "key_grad", "value_grad"), grads, strict=True))
    named = {"output": output.detach(), "lse": None if lse is None else lse.detach(), **parts}
    return {name: value for name, value in named.items() if value is not None}


def relative(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error in float64; infinite where finite numbers became others."""
    got, want = got.double().cpu(), want.double().cpu()
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return float("inf")
    apart = torch.linalg.vector_norm((got - want)[finite])
    size = torch.linalg.vector_norm(want[finite])
    return float(apart / size) if float(size) else float(apart)


# ---- the conformance suite


# what tells the most, of every method before the rest of any
FIRST = ("agreement", "gradients", "packing", "log-sum-exp")


def run_suite(setup: Setup) -> None:
    """The step: the public conformance suite on the device, the most telling checks of every method first."""
    from longlens.testing import check_names

    names = [name for name in check_names() if not name.startswith("memory")]
    first = [name for name in names if name in FIRST]
    rest = [name for name in names if name not in FIRST]
    methods = setup.pick(list_of_methods(), ["exact", "window:16"])
    with few_threads():
        for label, checks in setup.pick((("", first), (", other checks", rest)), (("", ["agreement"]),)):
            for method in methods:
                setup.measure(
                    f"{method}{label}", lambda method=method, checks=checks: suite(setup, method, checks)
                )  # fmt: skip


def suite(setup: Setup, method: str, checks: list[str]) -> dict[str, Any]:
    """Which checks passed and what failed."""
    report = run_conformance(
        longlens.attention, claims=claims_of(method), checks=checks, name=method, device=setup.device
    )
    return {
        "passed": sum(result.status == "pass" for result in report.results),
        "failed": {result.check: result.describe()[:200] for result in report.failures},
        "ok": report.ok,
    }
