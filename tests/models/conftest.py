"""Tests of models import benchmarks/parity.py, which knows a checkpoint of every family and its reference."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

if str(BENCHMARKS) not in sys.path:
    # behind everything else, since names such as "lens" or "contacts" are short
    sys.path.append(str(BENCHMARKS))
