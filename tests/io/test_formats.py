"""Files are written in memory that does not grow with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from longlens.testing import peak_growths


@pytest.mark.memory
def test_written_arrays_do_not_stay_in_memory():
    cases = [{"format": format, "residues": 60_000} for format in ("h5", "npz")]
    here = str(Path(__file__).parent)
    for growth in peak_growths(
        "write_formats:write", cases, path=[here], warm_up={"format": "h5", "residues": 1000}, runs=1
    ):
        # the arrays have 117 MiB
        assert growth < 64 * 2**20
