"""A scan in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from longlens.lens.across import rollout_map
from longlens.lens.collect import columns, maps, rows
from longlens.lens.scan import scan
from longlens.ops.observe import AttentionCall

SETS = {
    "rows": (rows.LogSumExp(), rows.Entropy(), rows.Largest(), rows.Distance(), rows.DistanceSpread(), rows.TopKeys(8)),
    "columns": (columns.Received(), columns.ReceivedMax(), columns.ColumnEntropy(), columns.TopQueries(4)),
    "maps": (maps.Pooled(128), maps.DistanceHistogram(), maps.WeightHistogram()),
}


def scan_pass(name: str, length: int, **settings: Any) -> Callable[[], object]:
    """A function that scans two heads of width 32; "rollout": two layers of them."""
    query, key = torch.randn(2, 1, 2, length, 32)
    if name == "rollout":
        return lambda: rollout_map([AttentionCall(0, "layer", query, key, key)] * 2, size=32)
    return lambda: scan(query, key, collect=SETS[name], **settings)
