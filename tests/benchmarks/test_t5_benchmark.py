"""The benchmark of T5 encoders, on its tiny model: contenders agree, and the tables are made."""

from __future__ import annotations

import json

import harness
import t5


def test_a_dry_run_compares_the_contenders_and_makes_the_tables(tmp_path):
    data = t5.main(["--dry-run", "--threads", "1", "--out", str(tmp_path)])
    rows = data["rows"]
    assert [row["contender"] for row in rows] == [*t5.CONTENDERS] * len(t5.DRY)
    assert all(row["median_s"] > 0 for row in rows)
    apart = [row["apart"] for row in rows if row["contender"] != "longlens"]
    assert len(apart) == 4
    assert max(apart) < 1e-5
    assert [row["backward"] for row in data["alone"]] == [False, True]
    assert all(row["load"] >= 0 for row in [*rows, *data["alone"]])
    assert "its load average" in t5.page_text(data)
    # a second run has nothing left to do, and says the same
    assert t5.main(["--dry-run", "--threads", "1", "--out", str(tmp_path)])["rows"] == rows
    text = t5.page_text(data)
    assert "| 64 |" in text
    assert "| 64, forward and gradients |" in text


def test_what_was_not_run_is_a_dash():
    about = {"cpu": "CPU", "cores": 1, "date": "2026-01-01", "packages": {"torch": "1", "transformers": "2"}}
    rows = [{"length": 128, "round": 0, "contender": "longlens", "seconds": 2.0, "growth_mib": 50.0}] + [
        {"length": 128, "round": 0, "contender": name, "not_run": "out of memory"} for name in t5.CONTENDERS[1:]
    ]
    data = {"machine": about, "threads": 1, "gib": 2.0, "shape": "dry", "rows": t5.summarise(rows), "alone": []}
    text = t5.page_text(data)
    assert "| 128 | 2.00 s | 50.0 MiB | - | - | - | - | - | - |" in text
    # rows of the time before it was recorded
    assert "The load of the machine was not recorded." in text
    assert "other work" not in text


def test_the_page_is_what_the_newest_results_give():
    newest = max(harness.RESULTS.glob("t5_*.json"), key=lambda path: path.stem[-10:])
    data = json.loads(newest.read_text())
    page = (harness.DOCS / "models.md").read_text()
    assert f"<!-- made by benchmarks/t5.py -->\n\n{t5.page_text(data).strip()}\n\n<!-- end -->" in page
