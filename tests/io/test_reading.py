"""Results in a folder become a DataFrame and show themselves in a notebook."""

from __future__ import annotations

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longlens.errors import InputError
from longlens.io.reading import open_results
from longlens.io.results import job_before


@pytest.fixture
def results(tmp_path):
    """Three proteins, the last of which was skipped."""
    (tmp_path / "manifest.json").write_text(json.dumps({"job": {}, "first_run_choices": {}, "complete": True}))
    table = {
        "record": [1, 2, 3], "id": ["a", "<b>", "c"], "length": [4, 3, None], "sha256": ["0", "1", None],
        "surprise": [1.25, 0.5, None], "problem": [None, None, "an odd letter"],
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "index.parquet")
    np.savez(tmp_path / "arrays.npz", **{"mean/6": np.zeros((2, 8), np.float32), "rank": np.zeros(7, np.int32)})
    return open_results(tmp_path)


def test_the_table_is_a_frame(results, monkeypatch):
    frame = results.to_frame()
    assert list(frame["id"]) == ["a", "<b>", "c"]
    assert list(frame.columns) == list(results.table[0])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"longlens\[notebook\]"):
        results.to_frame()


def test_a_notebook_shows_records_and_arrays(results):
    page = results._repr_html_()
    assert "3 records" in page
    assert "<td>2</td><td>&lt;b&gt;</td><td>3</td><td>0.5</td><td></td>" in page
    assert "an odd letter" in page
    assert "sha256" not in page
    assert "<td>mean/6</td><td>(2, 8)</td><td>float32</td>" in page
    assert "<td>rank</td><td>(7,)</td><td>int32</td>" in page


@pytest.mark.parametrize("text", ["{}", '{"complete": tr', "[]"])
def test_a_broken_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json: expected a manifest written by longlens"):
        open_results(tmp_path)
    with pytest.raises(InputError, match=r"manifest\.json: expected a manifest written by longlens"):
        job_before(tmp_path, {})


def test_differences_from_another_job_are_counted_beyond_ten(tmp_path):
    job = {"records": [{"n": n} for n in range(15)]}
    (tmp_path / "manifest.json").write_text(json.dumps({"complete": True, "job": job}))
    with pytest.raises(InputError, match=r"another job; (.*\n){11}  and 5 more$") as said:
        job_before(tmp_path, {"records": [{"n": -1} for _ in range(15)]})
    assert str(said.value).count("was ") == 10


def test_results_of_another_command_are_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"complete": true, "job": {}}')
    with pytest.raises(InputError, match="those of another command"):
        open_results(tmp_path)
