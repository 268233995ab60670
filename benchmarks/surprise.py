"""Surprise of every token of a long text by a GPT-2 of random weights, beside transformers' own evaluation.

    python benchmarks/surprise.py --minutes 90          # measure, and write the table of docs/surprise.md
    python benchmarks/surprise.py --dry-run             # a tiny model, for the tests

Contenders run in processes of their own and in turn. transformers' evaluation makes the logits of all tokens (N x V)
and their cross entropy; a length that needs more than --gib of memory counts as not run. The surprises of all
contenders of a length are compared, and those of a text that transformers could not do with the beginning that it
could. Each row has the load of the machine (runnable processes over the last minute) when it began.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import harness
from harness import Row

CONTENDERS = ("longlens", "transformers sdpa", "transformers eager")
# tokens, and rounds of them
LENGTHS = {1024: 3, 2048: 3, 4096: 3, 8192: 3, 16_384: 1, 32_768: 1, 100_000: 1}
DRY = {64: 2, 128: 1}


def measure(lengths: dict[int, int], shape: str, threads: int, gib: float, log: Path, deadline: float) -> None:
    """Run the lengths that the log does not have yet, in ascending order."""
    known = harness.read_lines(log)
    # what a longer text is compared with, kept for a run that goes on with this log
    peer = log.with_suffix(".peer.npy")
    worker = str(Path(__file__).with_name("surprise_worker.py"))
    processes = {
        name: harness.Conversation([sys.executable, worker, name, shape, str(threads), str(gib)]) for name in CONTENDERS
    }
    failed: set[str] = set()
    try:
        with tempfile.TemporaryDirectory() as place:
            for length, rounds in lengths.items():
                for turn in range(rounds):
                    if any(row.get("length") == length and row.get("round") == turn for row in known):
                        continue
                    if time.monotonic() > deadline:
                        return
                    measure_round(length, turn, processes, failed, Path(place), log, peer)
    finally:
        for process in processes.values():
            process.close()


def measure_round(
    length: int, turn: int, processes: dict[str, harness.Conversation], failed: set[str], place: Path, log: Path,
    peer: Path,
) -> None:  # fmt: skip
    """One round of a length; a contender that could not do a shorter length is not asked again."""
    found: dict[str, np.ndarray] = {}
    rows = []
    for name in harness.order_of(list(processes), turn):
        out = place / f"{name.replace(' ', '-')}.npy"
        out.unlink(missing_ok=True)
        load = harness.load()
        answer: Row = {"not_run": "a shorter text was too long"} if name in failed else processes[name].ask(
            {"length": length, "out": str(out)}
        )  # fmt: skip
        if "not_run" in answer:
            failed.add(name)
        else:
            found[name] = np.load(out)
        rows.append({"length": length, "round": turn, "contender": name, "load": load} | answer)
    ours = found["longlens"]
    for row in rows:
        theirs = found.get(row["contender"])
        if theirs is not None and row["contender"] != "longlens":
            row["apart"] = float(np.abs(ours - theirs).max())
            np.save(peer, theirs)
    if len(found) == 1 and peer.exists():
        beginning = np.load(peer)
        apart = float(np.abs(ours[: len(beginning)] - beginning).max())
        rows[[row["contender"] for row in rows].index("longlens")] |= {"apart": apart, "compared": len(beginning) + 1}
    for row in rows:
        harness.append_line(log, row)
        print(row, flush=True)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row for each length and contender: median seconds, highest memory, largest difference."""
    summary = []
    for length in sorted({row["length"] for row in rows if "length" in row}):
        for name in CONTENDERS:
            mine = [row for row in rows if row.get("length") == length and row.get("contender") == name]
            failed = next((row["not_run"] for row in mine if "not_run" in row), None)
            if failed or not mine:
                summary.append({"length": length, "contender": name, "not_run": failed or "time was up"})
                continue
            summary.append({
                "length": length, "contender": name, **harness.spread([row["seconds"] for row in mine]),
                "peak_mib": max(row["peak_mib"] for row in mine), "growth_mib": max(row["growth_mib"] for row in mine),
                **{key: max(row[key] for row in mine) for key in ("apart", "compared", "load") if key in mine[0]},
            })  # fmt: skip
    return summary


def page_text(data: dict[str, Any]) -> str:
    """The table, as docs/surprise.md has it."""
    machine = data["machine"]
    head = ["tokens", *(f"{name}: {what}" for name in CONTENDERS for what in ("time", "memory")), "largest difference"]
    lines = []
    for length in dict.fromkeys(row["length"] for row in data["rows"]):
        cells, largest = [], max(
            (row for row in data["rows"] if row["length"] == length and "apart" in row),
            key=lambda row: row["apart"], default=None,
        )  # fmt: skip
        for row in (row for row in data["rows"] if row["length"] == length):
            if "not_run" in row:
                cells += ["-", "-"]
                continue
            cells += [harness.show_seconds(row["median_s"]), harness.show_bytes(row["growth_mib"] * harness.MIB)]
        apart = ""
        if largest is not None:
            beginning = f" (the first {largest['compared']:,} tokens)" if "compared" in largest else ""
            apart = f"{largest['apart']:.1e}{beginning}"
        lines.append([f"{length:,}", *cells, apart])
    return (
        f"{harness.machine_line(machine)}, {data['threads']} threads, float32; torch {machine['packages']['torch']}, "
        f"transformers {machine['packages']['transformers']}. A GPT-2 of 12 layers, width 768, 12 heads and 50,257 "
        f'tokens, with 131,072 positions and random weights. Memory is what the process takes beyond the weights. "-": '
        f"not run within {data['gib']:g} GiB. The difference is that of single surprises, in nats. "
        f"{harness.load_line(data['rows'])}\n\n" + harness.table(head, lines)
    )


def conclude(log: Path, page: Path | None) -> dict[str, Any]:
    """The summary of a log, written beside it and to the page."""
    rows = harness.read_lines(log)
    data = {**rows[0], "rows": summarise(rows[1:])}
    harness.write_json(log.with_suffix(".json"), data)
    if page is not None:
        harness.fill(page, "surprise.py", page_text(data))
    return data


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90.0, help="no round is begun later")
    parser.add_argument("--threads", type=int, default=harness.cores())
    parser.add_argument("--gib", type=float, default=12.0, help="memory of each process")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="begin anew instead of going on with today's file")
    parser.add_argument("--no-page", action="store_true", help="leave docs/surprise.md alone")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model; the page is left alone")
    chosen = parser.parse_args(argv)
    theme = "surprise-dry" if chosen.dry_run else "surprise"
    log = chosen.out / f"{theme}_{harness.hardware()}_{time.strftime('%Y-%m-%d')}.jsonl"
    if chosen.fresh:
        log.unlink(missing_ok=True)
    if not log.exists():
        about = {"machine": harness.facts(), "threads": chosen.threads, "gib": chosen.gib}
        harness.append_line(log, about)
    lengths, shape = (DRY, "dry") if chosen.dry_run else (LENGTHS, "gpt2")
    measure(lengths, shape, chosen.threads, chosen.gib, log, time.monotonic() + 60 * chosen.minutes)
    return conclude(log, None if chosen.dry_run or chosen.no_page else harness.DOCS / "surprise.md")


if __name__ == "__main__":
    main()
