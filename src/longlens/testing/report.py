"""The report of the suite: a result for each check, which has a result for each case."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["pass", "fail", "not claimed", "not run"]


@dataclass(frozen=True)
class CaseResult:
    """One case of one check, with the expected value and the one that was got."""

    case: str
    ok: bool
    expected: str
    got: str


def within(case: str, error: float, limit: float) -> CaseResult:
    """The result of a case whose error must not exceed `limit`; NaN exceeds every limit."""
    return CaseResult(case, error <= limit, f"error <= {limit:.1e}", f"{error:.1e}")


@dataclass(frozen=True)
class CheckResult:
    """One check with the results of its cases. `note` says why it was not run, or which exception stopped it."""

    check: str
    status: Status
    findings: tuple[CaseResult, ...] = ()
    note: str = ""

    @property
    def failed(self) -> tuple[CaseResult, ...]:
        """The cases whose result is not as expected."""
        return tuple(finding for finding in self.findings if not finding.ok)

    def describe(self) -> str:
        """One line: the first failure with the expected and actual value, or the cases that were tested."""
        if self.status in ("not claimed", "not run"):
            return self.note
        if self.note:
            return self.note
        if self.failed:
            first = self.failed[0]
            more = f" (and {len(self.failed) - 1} more of {len(self.findings)})" if len(self.failed) > 1 else ""
            return f"{first.case}: expected {first.expected}, got {first.got}{more}"
        return f"{len(self.findings)} cases"


@dataclass(frozen=True)
class ConformanceReport:
    """Every check of one function.

    `errors` is the relative Frobenius error against softmax attention over all pairs, on standard normal inputs
    (1, 4, 256, 32), "bidirectional" and "causal"; it describes an approximation and does not make a check fail.
    """

    subject: str
    results: tuple[CheckResult, ...]
    errors: Mapping[str, float]

    @property
    def ok(self) -> bool:
        """Whether nothing that was claimed failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The checks that failed."""
        return tuple(result for result in self.results if result.status == "fail")

    def __getitem__(self, check: str) -> CheckResult:
        for result in self.results:
            if result.check == check:
                return result
        raise KeyError(f"expected a check of {', '.join(result.check for result in self.results)}, got {check!r}")

    def table(self) -> str:
        """Plain text: a line for each check, then the error against softmax and a count."""
        words = {"pass": "pass", "fail": "FAIL", "not claimed": "-", "not run": "not run"}
        wide = max(len(result.check) for result in self.results) if self.results else 0
        lines = [self.subject, ""]
        for result in self.results:
            text = "not claimed" if result.status == "not claimed" else result.describe()
            lines.append(f"  {result.check:<{wide}}  {words[result.status]:<7}  {text}".rstrip())
        for mode, error in self.errors.items():
            lines.append(f"  {'error':<{wide}}  {error:<7.2g}  against softmax, {mode}")
        counts = {word: sum(result.status == word for result in self.results) for word in words}
        lines += ["", "  " + ", ".join(f"{count} {word}" for word, count in counts.items() if count)]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as JSON; errors that are not finite as null."""
        text = {
            "subject": self.subject,
            "ok": self.ok,
            "errors": {mode: error if math.isfinite(error) else None for mode, error in self.errors.items()},
            "results": [asdict(result) for result in self.results],
        }
        return json.dumps(text, indent=2)
