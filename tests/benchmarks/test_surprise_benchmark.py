"""The benchmark of surprise, on its tiny model: contenders agree, and the table is made."""

from __future__ import annotations

import json
import os

import numpy as np

import gpu_page
import surprise


def test_a_dry_run_compares_the_contenders_and_makes_the_table(tmp_path):
    data = surprise.main(["--dry-run", "--threads", "1", "--out", str(tmp_path)])
    rows = data["rows"]
    assert [row["contender"] for row in rows] == [*surprise.CONTENDERS] * len(surprise.DRY)
    assert all(row["median_s"] > 0 for row in rows)
    apart = [row["apart"] for row in rows if row["contender"] != "longlens"]
    assert len(apart) == 4
    assert max(apart) < 1e-4
    assert all(row["load"] >= 0 for row in rows)
    assert "its load average" in surprise.page_text(data)
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
    assert "The load of the machine was not recorded." in text


class Answers:
    """A contender's process that gives surprises without computing, or that ran out of memory."""

    def __init__(self, surprises):
        self.surprises = surprises

    def ask(self, request):
        if self.surprises is None:
            return {"not_run": "out of memory"}
        np.save(request["out"], self.surprises)
        return {"seconds": 1.0}


def test_a_run_that_goes_on_still_compares_with_what_a_peer_could_do(tmp_path):
    log, peer = tmp_path / "log.jsonl", tmp_path / "log.peer.npy"
    ours = np.arange(8.0)
    runs = (("one", ours[:4], ours[:4] + 0.5), ("another", ours, None))
    for place, mine, theirs in runs:
        # another process has another temporary folder
        (tmp_path / place).mkdir()
        processes = {"longlens": Answers(mine), "transformers sdpa": Answers(theirs)}
        surprise.measure_round(len(mine), 0, processes, set(), tmp_path / place, log, peer)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    last = next(row for row in rows if row["length"] == 8 and row["contender"] == "longlens")
    assert (last["apart"], last["compared"]) == (0.5, 5)


def test_the_newest_results_of_a_gpu_are_those_of_the_latest_date(tmp_path):
    dates = {"gpu_a.jsonl": "2026-11-27", "gpu_b.jsonl": "2026-11-26", "gpu_c.jsonl": "2026-11-27"}
    files = []
    for age, (name, date) in enumerate(dates.items()):
        files.append(tmp_path / name)
        files[-1].write_text(json.dumps({"name": "machine", "date": date}) + "\n")
        os.utime(files[-1], (1000 - age, 1000 - age))
    assert gpu_page.newest_file(files) == tmp_path / "gpu_a.jsonl"
    os.utime(files[2], (2000, 2000))
    assert gpu_page.newest_file(files) == tmp_path / "gpu_c.jsonl"
