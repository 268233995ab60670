"""Benchmarks are programs beside the package: their folder goes onto the path, as it does when one of them is run."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

if str(BENCHMARKS) not in sys.path:
    # behind everything else, since names such as "lens" or "contacts" are short
    sys.path.append(str(BENCHMARKS))
