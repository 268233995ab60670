"""A scan in a process of its own, for `lens.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longlens import scan
from longlens.lens import Distance, Entropy, Largest, LogSumExp, Pooled, Received, TopKeys

SETS = {
    "received": (Received(),),
    "standard": (LogSumExp(), Entropy(), Largest(), Distance(), Received(), TopKeys(8)),
    "pooled": (Pooled(256),),
}


def lens_pass(name: str, length: int) -> Callable[[], object]:
    """A function that scans 4 heads of width 64."""
    query, key = torch.randn(2, 1, 4, length, 64)
    return lambda: scan(query, key, collect=SETS[name])
