"""Files are written in memory that does not grow with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from longlens.testing import peak_growths


@pytest.mark.memory
@pytest.mark.parametrize(("format", "warm_up"), [("h5", "h5"), ("npz", "h5"), ("parquet", "parquet")])
def test_written_arrays_do_not_stay_in_memory(format, warm_up):
    case = {"format": format, "residues": 120_000}
    here = str(Path(__file__).parent)
    (growth,) = peak_growths(
        "write_formats:write", [case], path=[here], warm_up={"format": warm_up, "residues": 1000}, runs=1
    )
    # the arrays have 234 MiB
    assert growth < 117 * 2**20
