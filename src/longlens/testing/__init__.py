"""The public conformance suite: run any attention function, from longlens or elsewhere, through the same checks.

    from longlens.testing import Claims, run_conformance

    report = run_conformance(my_attention, claims=Claims(key_mask="mask", dtypes=("float32", "bfloat16")))
    print(report.table())
    assert report.ok

On a command line: `longlens conformance my_module:my_attention`.
"""

from __future__ import annotations

from longlens.testing.claims import Claims, Request, softmax_definition, softmax_lse
from longlens.testing.conformance import check_names, measure_errors, run_conformance
from longlens.testing.memory import peak_growth, peak_growths
from longlens.testing.own import claims_of, run_method
from longlens.testing.report import CaseResult, CheckResult, ConformanceReport

__all__ = [
    "CaseResult",
    "CheckResult",
    "Claims",
    "ConformanceReport",
    "Request",
    "check_names",
    "claims_of",
    "measure_errors",
    "peak_growth",
    "peak_growths",
    "run_conformance",
    "run_method",
    "softmax_definition",
    "softmax_lse",
]
