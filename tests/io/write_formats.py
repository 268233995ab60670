"""What the memory test of formats measures: large mapped arrays written to a file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from longlens.io.formats import write_arrays
from longlens.io.result_arrays import ResultArrays
from longlens.io.results import ArraySpec
from longlens.io.row_array import RowArray


def write(format: str, residues: int) -> Callable[[], object]:
    """Arrays of `residues` rows of 2 KiB, proteins of 500 residues."""
    folder = tempfile.TemporaryDirectory()
    rows = RowArray(Path(folder.name) / "rows", "float32", (512,))
    for start in range(0, residues, 500):
        rows.write(start, np.full((500, 512), start, np.float32))
    starts = np.arange(0, residues + 1, 500)
    names = [f"p{number}" for number in range(len(starts) - 1)]
    spec = ArraySpec("per_tok/6", "residue", (512,), "float32")

    def call() -> object:
        made = Path(folder.name) / "made"
        made.mkdir(exist_ok=True)
        return write_arrays(
            ResultArrays([spec], {spec.name: rows.read(residues)}, starts, names, {"model": "none"}), format, made
        )

    return call
