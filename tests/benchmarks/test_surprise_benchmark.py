"""The benchmark of surprise, on its tiny model: contenders agree, and the table is made."""

from __future__ import annotations

import surprise


def test_a_dry_run_compares_the_contenders_and_makes_the_table(tmp_path):
    data = surprise.main(["--dry-run", "--threads", "1", "--out", str(tmp_path)])
    rows = data["rows"]
    assert [row["contender"] for row in rows] == [*surprise.CONTENDERS] * len(surprise.DRY)
    assert all(row["median_s"] > 0 for row in rows)
    apart = [row["apart"] for row in rows if row["contender"] != "longlens"]
    assert len(apart) == 4
    assert max(apart) < 1e-4
    # a second run has nothing left to do, and says the same
    assert surprise.main(["--dry-run", "--threads", "1", "--out", str(tmp_path)])["rows"] == rows
    assert "| 64 |" in surprise.page_text(data)


def test_what_was_not_run_and_what_was_compared_in_part():
    about = {"cpu": "CPU", "cores": 1, "date": "2026-01-01", "packages": {"torch": "1", "transformers": "2"}}
    ran = {"seconds": 2.0, "peak_mib": 100.0, "growth_mib": 50.0, "apart": 2e-6, "compared": 64}
    rows = [{"length": 128, "round": 0, "contender": "longlens", **ran}] + [
        {"length": 128, "round": 0, "contender": name, "not_run": "out of memory"} for name in surprise.CONTENDERS[1:]
    ]
    text = surprise.page_text({"machine": about, "threads": 1, "gib": 2.0, "rows": surprise.summarise(rows)})
    assert text.splitlines()[-1] == "| 128 | 2.00 s | 50.0 MiB | - | - | - | - | 2.0e-06 (the first 64 tokens) |"
