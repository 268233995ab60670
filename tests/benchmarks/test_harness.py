"""The harness: rounds in turn, ratios within rounds, peaks of processes, results that survive a cut, pages."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from harness import (
    DOCS,
    HERE,
    MIB,
    Conversation,
    Tables,
    append_line,
    facts,
    fill,
    hardware,
    interleave,
    machine_line,
    newest,
    order_of,
    product_rate,
    ratio,
    read_lines,
    run_measured,
    show_ratio,
    table,
    write_json,
)


def test_each_contender_begins_and_ends_equally_often() -> None:
    names = ["a", "b", "c"]
    orders = [order_of(names, turn) for turn in range(6)]
    assert orders[:3] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert all(sorted(order) == names for order in orders)
    for place in range(3):
        assert sorted(order[place] for order in orders) == sorted(names * 2)
    # who follows whom changes too
    assert {tuple(order) for order in orders[3:]} == {("c", "b", "a"), ("a", "c", "b"), ("b", "a", "c")}
    assert order_of([], 3) == []


def test_all_contenders_have_the_same_rounds_and_warm_ups_do_not_count() -> None:
    called: list[str] = []
    taken = interleave({name: lambda name=name: called.append(name) for name in "ab"}, 4, warm_ups=2)
    assert {name: len(times) for name, times in taken.items()} == {"a": 4, "b": 4}
    assert called.count("a") == called.count("b") == 6
    assert called[:4] == ["a", "b", "b", "a"]


def test_a_deadline_ends_after_a_whole_round() -> None:
    taken = interleave({"a": lambda: None, "b": lambda: None}, 50, deadline=time.monotonic() - 1)
    assert len(taken["a"]) == len(taken["b"]) == 1


def test_a_ratio_is_taken_within_rounds() -> None:
    # the machine was ten times slower in the second round, for both
    row = ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert row == {"ratio": 2.0, "ratio_low": 2.0, "ratio_high": 3.0}
    assert show_ratio(row) == "2.00x (2.00 to 3.00)"
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def test_the_peak_of_a_process_is_its_own() -> None:
    def peak(code: str) -> float:
        done = run_measured([sys.executable, "-c", code])
        assert done.status == 0
        assert done.output == "said\n"
        return done.peak / MIB

    small = peak("print('said')")
    assert 55 < peak("b = bytearray(64 * 2**20); print('said')") - small < 80
    assert run_measured([sys.executable, "-c", "raise SystemExit(3)"]).status == 3


def test_a_conversation_answers_line_by_line_and_tells_why_it_ended() -> None:
    code = (
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    if json.loads(line) == 'end': raise ValueError('no more of it')\n"
        "    print('chatter'); print(json.dumps({'got': json.loads(line)}), flush=True)"
    )
    talk = Conversation([sys.executable, "-c", code])
    try:
        assert talk.ask([1, 2]) == {"got": [1, 2]}
        assert talk.ask("more") == {"got": "more"}
        assert talk.ask("end") == {"not_run": "ValueError: no more of it"}
        assert "no more of it" in talk.ask("after the end")["not_run"]
    finally:
        talk.close()


def test_a_line_that_was_cut_off_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log.jsonl"
    assert read_lines(log) == []
    append_line(log, {"round": 0})
    with log.open("a") as file:
        file.write('{"round": 1, "sec')
    append_line(log, {"round": 2})
    assert read_lines(log) == [{"round": 0}, {"round": 2}]


def test_tables_replace_rows_of_the_same_keys_and_come_back_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    tables = Tables(path, ("time", "memory"))
    for value in (1, 2):
        tables.put("time", {"contender": "a", "length": 512, "value": value}, ("contender", "length"))
    tables.put("time", {"contender": "b", "length": 512, "value": 3}, ("contender", "length"))
    again = Tables(path, ("time", "memory"))
    assert again.find("time", contender="a") == {"contender": "a", "length": 512, "value": 2}
    assert again.find("time", contender="c") is None
    assert (len(again.data["time"]), again.data["memory"]) == (2, [])
    assert again.data["commits"] == tables.data["commits"]


def test_the_newest_results_are_found_by_their_date(tmp_path: Path) -> None:
    for name in ("lens_2026-02-01", "lens_2026-10-01", "lens_peers_2026-11-01"):
        write_json(tmp_path / f"{name}.json", {})
    assert newest("lens", tmp_path) == tmp_path / "lens_2026-10-01.json"
    assert newest("lens_peers", tmp_path) == tmp_path / "lens_peers_2026-11-01.json"
    assert newest("lens_*", tmp_path) == tmp_path / "lens_peers_2026-11-01.json"
    assert newest("families", tmp_path) is None


def test_a_page_is_filled_between_its_marks_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- made by benchmarks/a.py -->\nold\n<!-- end -->\nbetween\n"
                    "<!-- made by benchmarks/b.py -->\nkept\n<!-- end -->\nafter\n")  # fmt: skip
    fill(page, "a.py", table(["", "x"], [["row", "1"]]))
    assert page.read_text() == (
        "before\n<!-- made by benchmarks/a.py -->\n\n|  | x |\n|---|---:|\n| row | 1 |\n\n<!-- end -->\nbetween\n"
        "<!-- made by benchmarks/b.py -->\nkept\n<!-- end -->\nafter\n"
    )
    with pytest.raises(ValueError, match=r"c\.py"):
        fill(page, "c.py", "text")


def test_what_is_said_of_the_machine_names_no_place() -> None:
    about = facts()
    assert about["cores"] >= 1
    assert str(Path.home()) not in str(about)
    assert machine_line(about).startswith(about["cpu"])
    assert hardware().endswith(f"{about['cores']}c")
    assert product_rate("float32", (8, 8, 8)) > 0


@pytest.mark.parametrize(
    ("page", "maker"),
    [
        ("benchmarks.md", "embedding.py"),
        ("benchmarks.md", "tables.py: claims"),
        ("benchmarks.md", "tables.py: contenders"),
        ("conformance.md", "peers_conformance.py: peers"),
        ("conformance.md", "peers_conformance.py: ours"),
        ("contacts.md", "contacts.py"),
        ("families.md", "families.py"),
        ("finetuning.md", "finetuning.py"),
        ("lens.md", "lens.py"),
        ("lens-peers.md", "lens_peers.py"),
    ],
)
def test_every_page_has_the_marks_of_its_benchmark(tmp_path: Path, page: str, maker: str) -> None:
    # the table of a run that took an hour must find its place
    copy = tmp_path / page
    copy.write_text((DOCS / page).read_text())
    fill(copy, maker, "the table")
    assert f"<!-- made by benchmarks/{maker} -->\n\nthe table\n\n<!-- end -->" in copy.read_text()
    assert f'"{maker}"' in (HERE / maker.partition(":")[0]).read_text()
