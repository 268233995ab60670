"""The benchmark of what carried a prediction, on a little of `tiny`: its rows, its run and the tables of the page."""

from __future__ import annotations

import pytest

import context


def test_a_dry_run_measures_and_makes_the_tables():
    data = context.main(["--dry-run", "--threads", "1"])
    rows = data["rows"]
    assert len(rows) == 2
    for row in rows:
        assert all(-1 <= row[name] <= 1 for name in context.MEASURES)
        # surprise, and each stretch; the estimate
        assert row["forward"] == row["stretches"] + 2
        assert row["backward"] == 1
    (run,) = data["runs"]
    assert run["target"] == 20
    assert [span[:2] for span in run["spans"][:3]] == [[1, 16], [17, 32], [33, 40]]
    assert "| estimate |" in context.correlations(rows)
    assert context.curves(data["runs"]).splitlines()[-1].startswith("| tiny | 4 | 16: ")
    share = {measure: [0.5, 1.0] for measure in context.COPY_MEASURES}
    assert context.copies({"trained": share}).splitlines()[-1] == "| trained |" + " 0.75 (0.50 to 1.00) |" * 5


def test_a_folder_without_the_decoder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        context.main([str(tmp_path)])
    assert "the folder of examples/surprise.py" in capsys.readouterr().err
