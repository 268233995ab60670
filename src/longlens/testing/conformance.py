"""The conformance suite: its checks, the claims that each check needs, and the run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from longlens.errors import InputError, LonglensError
from longlens.testing import independence, values
from longlens.testing.claims import Claims, softmax_definition
from longlens.testing.memory import LINEAR, MIB, attention_call, import_function, peak_growths
from longlens.testing.report import CaseResult, CheckResult, ConformanceReport, Status
from longlens.testing.subject import Subject, relative_error

MEMORY_LENGTHS = (8192, 16384)
# bytes of growth that say nothing about the length
PAGES = 2**19


@dataclass(frozen=True)
class Check:
    """One check: its name, the claims that it needs, and the function that runs it."""

    name: str
    needs: str
    claimed: Callable[[Claims], bool]
    run: Callable[[Subject], Iterator[CaseResult]]


CHECKS: tuple[Check, ...] = (
    Check("agreement", "a definition", lambda c: c.defined, values.agreement),
    Check("odd lengths", "lengths", lambda c: bool(c.lengths), values.odd_lengths),
    Check("cross lengths", "cross_lengths", lambda c: c.cross_lengths, values.cross_lengths),
    Check("value width", "value_width", lambda c: c.value_width, values.value_width),
    Check("grouped heads", "grouped", lambda c: c.grouped, values.grouped),
    Check("scale", "scale", lambda c: c.scale, values.scale),
    Check("dtypes", "dtypes", lambda c: True, values.dtypes),
    Check("gradients", "gradients", lambda c: c.gradients, values.gradient_values),
    Check("second derivatives", "second_derivatives", lambda c: c.second_derivatives, values.second_derivatives),
    Check("log-sum-exp", "lse", lambda c: c.lse is not None, values.log_sum_exp),
    Check("softcap", "softcap", lambda c: c.softcap and c.defined, values.softcap),
    Check("sinks", "sinks", lambda c: c.sinks and c.defined, values.sinks),
    Check("dropout", "dropout", lambda c: c.dropout, values.dropout),
    Check("padding left", "key_mask", lambda c: c.key_mask is not None, independence.padding_left),
    Check("padding right", "key_mask", lambda c: c.key_mask is not None, independence.padding_right),
    Check("batch", "nothing", lambda c: True, independence.batch),
    Check("causality", "causal", lambda c: c.causal is not None, independence.causality),
    Check("packing", "packing", lambda c: c.packing is not None, independence.packing),
    Check("tensor mask", "attn_mask", lambda c: c.attn_mask and c.defined, independence.tensor_mask),
    Check(
        "fully masked rows",
        "key_mask, attn_mask, or a bottom-right causal mask with cross_lengths",
        lambda c: c.key_mask is not None or c.attn_mask or (c.causal == "bottom-right" and c.cross_lengths),
        independence.fully_masked,
    ),
    Check(
        "masked NaN",
        "key_mask, causal or pattern",
        lambda c: c.key_mask is not None or c.causal is not None or c.pattern is not None,
        independence.masked_nan,
    ),
    Check("layouts", "nothing", lambda c: True, independence.layouts),
    Check("determinism", "nothing", lambda c: True, independence.determinism),
)

MEMORY_CHECKS = ("memory forward", "memory backward")


def check_names() -> tuple[str, ...]:
    """The names of all checks, in the order of the report."""
    return (*(check.name for check in CHECKS), *MEMORY_CHECKS)


def run_conformance(
    function: Callable[..., Any],
    *,
    claims: Claims | None = None,
    target: str | None = None,
    checks: Collection[str] | None = None,
    memory_lengths: tuple[int, int] = MEMORY_LENGTHS,
    name: str | None = None,
    device: str = "cpu",
) -> ConformanceReport:
    """Run an attention function through the suite.

    Args:
        function: `f(query, key, value, ...)` on (B, H, N, D) tensors, with those keywords of
            `torch.nn.functional.scaled_dot_product_attention` that `claims` says it takes.
        claims: its claims; None means `Claims()`: exact softmax attention in float32 with gradients.
        target: "module:function" by which a fresh process imports it, for the memory checks; None means the function's
            own module and name, if it has them.
        checks: names of the checks to run, out of `check_names()`; None means all.
        memory_lengths: N and 2 N of the memory checks.
        name: the name of the function in the report.
        device: where the function gets its tensors ("cuda"); what it is compared with is float64 on the CPU, and the
            plain implementation whose rounding sets the tolerance runs there too. Memory is measured on the CPU.

    Returns:
        A report with one result for each check. If the function raises an exception, the check fails.

    Raises:
        InputError: a check that does not exist.
    """
    unknown = set(checks or ()) - set(check_names())
    if unknown:
        raise InputError(f"expected checks of {', '.join(check_names())}, got {', '.join(sorted(unknown))}")
    claims = claims or Claims()
    target = target or _target(function)
    subject = Subject(function, claims, target, device)
    selected = [check for check in CHECKS if checks is None or check.name in checks]
    results = [_run(check, subject) for check in selected]
    results += [
        _run_memory(check, subject, memory_lengths) for check in MEMORY_CHECKS if checks is None or check in checks
    ]
    errors = measure_errors(function, claims, device) if checks is None else {}
    return ConformanceReport(name or target or repr(function), tuple(results), errors)


def measure_errors(function: Callable[..., Any], claims: Claims, device: str = "cpu") -> dict[str, float]:
    """Relative Frobenius error against softmax attention over all pairs, on standard normal inputs (1, 4, 256, 32)."""
    subject = Subject(function, claims, device=device)
    errors = {}
    for mode, causal in subject.modes():
        request = subject.draw(1, 4, 256, 32, is_causal=causal)
        try:
            errors[mode] = relative_error(subject(request), softmax_definition(request))
        except Exception:  # the function may raise any exception; the checks report it
            errors[mode] = float("nan")
    return errors


def _run(check: Check, subject: Subject) -> CheckResult:
    if not check.claimed(subject.claims):
        return CheckResult(check.name, "not claimed", note=f"needs {check.needs}")
    findings = []
    state = torch.random.get_rng_state()
    try:
        for finding in check.run(subject):
            findings.append(finding)
    except Exception as error:  # the function may raise any exception, which is reported as a failure
        return CheckResult(check.name, "fail", tuple(findings), f"raised {_message(error)}")
    finally:
        torch.random.set_rng_state(state)
    return CheckResult(check.name, _verdict(findings), tuple(findings))


def _run_memory(name: str, subject: Subject, lengths: tuple[int, int]) -> CheckResult:
    claims = subject.claims
    backward = name == "memory backward"
    if claims.memory is None or (backward and not claims.gradients):
        return CheckResult(name, "not claimed", note="needs memory" + " and gradients" * backward)
    if subject.target is None:
        return CheckResult(name, "not run", note='a fresh process cannot import it: give target="module:function"')
    keywords = dict(claims.keywords)
    findings: list[CaseResult] = []
    for mode, causal in subject.modes():
        case = {
            "function": subject.target,
            "heads": 2,
            "width": 32,
            "causal": None if claims.causal is None else causal,
            "backward": backward,
            "keywords": keywords,
        }
        try:
            growth = peak_growths(
                f"{attention_call.__module__}:{attention_call.__name__}",
                [case | {"length": length} for length in lengths],
                warm_up={"length": 128},
            )
        except LonglensError as error:
            return CheckResult(name, "fail", tuple(findings), f"raised {_message(error)}")
        findings.append(memory_finding(mode, lengths, growth))
    return CheckResult(name, _verdict(findings), tuple(findings))


def _verdict(findings: list[CaseResult]) -> Status:
    return "pass" if all(finding.ok for finding in findings) else "fail"


def memory_finding(case: str, lengths: tuple[int, int], growth: list[int]) -> CaseResult:
    """Whether growth from N to 2 N is linear."""
    # the allocator asks the system for pages in steps of some hundred KiB, which counts where the growth is small
    ratio = (growth[1] - PAGES) / max(1, growth[0])
    message = f"{ratio:.2f} times ({growth[0] / MIB:.1f} to {growth[1] / MIB:.1f} MiB)"
    return CaseResult(f"N={lengths[0]} to {lengths[1]}, {case}", ratio <= LINEAR, f"at most {LINEAR} times", message)


def _message(error: Exception) -> str:
    """Class and message of an exception in one line, shortened if it is long."""
    message = " ".join(str(error).split())
    message = message if len(message) <= 160 else message[:157] + "..."
    return f"{type(error).__name__}: {message}".removesuffix(": ")


def _target(function: Callable[..., Any]) -> str | None:
    """The "module:function" by which another process can import `function`; None if there is none."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or module == "__main__" or "<" in name:
        return None
    path = f"{module}:{name}"
    try:
        imported = import_function(path)
    except Exception:  # an exception here would be raised in the other process too
        return None
    return path if imported is function else None
