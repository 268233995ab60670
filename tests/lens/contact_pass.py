"""Contact maps of layers of random queries and keys, run in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longlens.lens.contacts import KeptMap, Regression, WholeMap


def contact_pass(residues: int, kept: bool) -> Callable[[], None]:
    """A function that runs one layer of four heads; every row of the map is made."""
    query, key = torch.randn(2, 4, residues + 2, 16)
    lse = torch.full((4, residues + 2), 5.0)

    def run() -> None:
        regression = Regression(torch.tensor([[1.0, -1.0, 0.5, 2.0]]), 0.0)
        contact_map = KeptMap(residues, regression) if kept else WholeMap(residues, regression, torch.device("cpu"))
        contact_map.add(0, query, key, lse, 0.25)
        assert sum(len(rows.probabilities) for rows in contact_map.rows()) == residues

    return run
