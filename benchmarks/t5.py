"""A T5 encoder of random weights over long proteins, beside transformers; and attention alone with T5's bias.

    python benchmarks/t5.py --minutes 60          # measure, and write the table of docs/models.md
    python benchmarks/t5.py --dry-run             # a tiny model, for the tests

Contenders run in processes of their own and in turn, in the same rounds. transformers makes the bias of a layer and,
from it, masks and scores of H x N x N; a length that needs more than --gib of memory counts as not run. The vectors of
all contenders of a length are compared. Speeds are compared by the ratio within a round. Each row has the load of the
machine (`harness.load`) when it began.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import harness
from harness import Row

CONTENDERS = ("longlens", "transformers sdpa", "transformers eager")
SHAPE = "ProtT5, 4 of its 24 layers"
# tokens, and rounds of them
LENGTHS = {512: 3, 1024: 3, 2048: 3, 4096: 2, 8192: 1, 16_384: 1}
DRY = {32: 2, 64: 1}
# attention alone: (1, heads, N, width)
HEADS, WIDTH = 4, 64
ALONE = {2048: 5, 8192: 3}
TILES_UP_TO = 8192
ALONE_DRY = {64: 2}
WAYS = ("without a bias", "T5's bias", "T5's bias, tiles")


def measure(lengths: dict[int, int], shape: str, threads: int, gib: float, log: Path, deadline: float) -> None:
    """Run the lengths that the log does not have yet, in ascending order."""
    known = harness.read_lines(log)
    worker = str(Path(__file__).with_name("t5_worker.py"))
    processes = {
        name: harness.Conversation([sys.executable, worker, name, shape, str(threads), str(gib)]) for name in CONTENDERS
    }
    failed: set[str] = set()
    try:
        with tempfile.TemporaryDirectory() as place:
            for length, rounds in lengths.items():
                for turn in range(rounds):
                    done = any(row.get("length") == length and row.get("round") == turn for row in known)
                    if not done and time.monotonic() < deadline:
                        measure_round(length, turn, processes, failed, Path(place), log)
    finally:
        for process in processes.values():
            process.close()


def measure_round(
    length: int, turn: int, processes: dict[str, harness.Conversation], failed: set[str], place: Path, log: Path
) -> None:
    """One round of a length; a contender that could not do a shorter length is not asked again."""
    found: dict[str, np.ndarray] = {}
    rows: list[Row] = []
    for name in harness.order_of(list(processes), turn):
        out, load = place / f"{name.replace(' ', '-')}.npy", harness.load()
        answer: Row = {"not_run": "a shorter protein was too long"} if name in failed else processes[name].ask(
            {"length": length, "out": str(out)}
        )  # fmt: skip
        if "not_run" in answer:
            failed.add(name)
        else:
            found[name] = np.load(out)
        rows.append({"length": length, "round": turn, "contender": name, "load": load} | answer)
    for row in rows:
        theirs = found.get(row["contender"])
        if theirs is not None and row["contender"] != "longlens" and "longlens" in found:
            row["apart"] = float(np.linalg.norm(found["longlens"] - theirs) / np.linalg.norm(theirs))
        harness.append_line(log, row)
        print(row, flush=True)


def measure_alone(lengths: dict[int, int], log: Path, deadline: float) -> None:
    """Attention alone, in this process: forward, and forward with every gradient."""
    known = harness.read_lines(log)
    for length, rounds in lengths.items():
        for backward in (False, True):
            case: Row = {"alone": length, "backward": backward}
            if any(case.items() <= row.items() for row in known) or time.monotonic() > deadline:
                continue
            ways = WAYS if length <= TILES_UP_TO else WAYS[:2]
            load = harness.load()
            taken = harness.interleave({way: attention(way, length, backward) for way in ways}, rounds, warm_ups=1)
            harness.append_line(log, case | {"load": load, "seconds": taken})
            print(case, taken, flush=True)


def attention(way: str, length: int, backward: bool) -> Callable[[], object]:
    """A call of `longlens.attention` in float32; with `backward` the gradients of all that it takes."""
    import torch

    import longlens

    torch.manual_seed(0)
    leaves = [torch.randn(1, HEADS, length, WIDTH, requires_grad=backward) for _ in range(3)]
    table = torch.randn(HEADS, 32, requires_grad=backward)
    weight = torch.ones(1, HEADS, length, WIDTH)
    wanted = leaves if way == WAYS[0] else [*leaves, table]
    method = "exact:blockwise" if way == WAYS[2] else "exact"

    def call() -> object:
        bias = None if way == WAYS[0] else longlens.RelativePosition(table, "t5")
        with torch.set_grad_enabled(backward):
            output = longlens.attention(*leaves, bias=bias, method=method)
        return torch.autograd.grad(output, wanted, weight) if backward else output

    return call


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row for each length and contender: seconds, highest memory, difference, ratio to longlens within rounds."""
    summary = []
    for length in sorted({row["length"] for row in rows if "length" in row}):
        mine = [row for row in rows if row.get("length") == length]
        ours = {row["round"]: row["seconds"] for row in mine if row["contender"] == "longlens" and "seconds" in row}
        for name in CONTENDERS:
            his = [row for row in mine if row["contender"] == name]
            failed = next((row["not_run"] for row in his if "not_run" in row), None)
            if failed or not his:
                summary.append({"length": length, "contender": name, "not_run": failed or "time was up"})
                continue
            summary.append({
                "length": length, "contender": name, **harness.spread([row["seconds"] for row in his]),
                "growth_mib": max(row["growth_mib"] for row in his),
                **{key: max(row[key] for row in his) for key in ("apart", "load") if key in his[0]},
                **harness.ratio([row["seconds"] for row in his], [ours[row["round"]] for row in his]),
            })  # fmt: skip
    return summary


def page_text(data: dict[str, Any]) -> str:
    """The tables, as docs/models.md has them."""
    machine = data["machine"]
    head = ["tokens"]
    for name in CONTENDERS:
        head += [f"{name}: time", "memory"] + ([] if name == "longlens" else ["times longlens"])
    lines, apart = [], 0.0
    for length in dict.fromkeys(row["length"] for row in data["rows"]):
        cells = [f"{length:,}"]
        for row in (row for row in data["rows"] if row["length"] == length):
            others = row["contender"] != "longlens"
            if "not_run" in row:
                cells += ["-"] * (3 if others else 2)
                continue
            cells += [harness.show_seconds(row["median_s"]), harness.show_bytes(row["growth_mib"] * harness.MIB)]
            cells += [harness.show_ratio(row)] if others else []
            apart = max(apart, row.get("apart", 0.0))
        lines.append(cells)
    text = (
        f"{harness.machine_line(machine)}, {data['threads']} threads, float32; torch {machine['packages']['torch']}, "
        f"transformers {machine['packages']['transformers']}; times are compared within rounds (median and range). "
        f"{data['shape']}: random weights, one protein. Memory is what the process takes beyond the weights. "
        f'"-": not run within {data["gib"]:g} GiB. Vectors differ by at most {apart:.0e}, relatively. '
        f"{harness.load_line([*data['rows'], *data['alone']])}\n\n" + harness.table(head, lines)
    )
    rows = [
        [
            f"{row['alone']:,}, {'forward and gradients' if row['backward'] else 'forward'}",
            *(harness.show_seconds(float(np.median(row["seconds"][way]))) if way in row["seconds"] else "-"
              for way in WAYS),
            harness.show_ratio(harness.ratio(row["seconds"][WAYS[1]], row["seconds"][WAYS[0]])),
        ]
        for row in data["alone"]
    ]  # fmt: skip
    return (
        f"{text}\nAttention alone, {HEADS} heads of width {WIDTH}, in this process; the gradient of the table is among "
        "the gradients, and the last column is T5's bias relative to none, within rounds:\n\n"
        + harness.table(["tokens", *WAYS, "relative to none"], rows)
    )


def conclude(log: Path, page: Path | None) -> dict[str, Any]:
    """The summary of a log, written beside it and to the page."""
    rows = harness.read_lines(log)
    data = {**rows[0], "rows": summarise(rows[1:]), "alone": [row for row in rows[1:] if "alone" in row]}
    harness.write_json(log.with_suffix(".json"), data)
    if page is not None:
        harness.fill(page, "t5.py", page_text(data))
    return data


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="no round is begun later")
    parser.add_argument("--threads", type=int, default=harness.cores())
    parser.add_argument("--gib", type=float, default=9.0, help="memory of each process")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="begin anew instead of going on with today's file")
    parser.add_argument("--no-page", action="store_true", help="leave docs/models.md alone")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model; the page is left alone")
    chosen = parser.parse_args(argv)
    theme, shape = ("t5-dry", "dry") if chosen.dry_run else ("t5", SHAPE)
    log = chosen.out / f"{theme}_{harness.hardware()}_{time.strftime('%Y-%m-%d')}.jsonl"
    if chosen.fresh:
        log.unlink(missing_ok=True)
    if not log.exists():
        about = {"machine": harness.facts(), "threads": chosen.threads, "gib": chosen.gib, "shape": shape}
        harness.append_line(log, about)
    deadline = time.monotonic() + 60 * chosen.minutes
    measure_alone(ALONE_DRY if chosen.dry_run else ALONE, log, deadline)
    measure(DRY if chosen.dry_run else LENGTHS, shape, chosen.threads, chosen.gib, log, deadline)
    return conclude(log, None if chosen.dry_run or chosen.no_page else harness.DOCS / "models.md")


if __name__ == "__main__":
    main()
