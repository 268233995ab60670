"""Measure longlens and its peers side by side, and write what comes out as JSON, tables and plots.

    python benchmarks/run.py                 the standard run: at most 25 minutes on two cores
    python benchmarks/run.py --minutes 60    more time: cells that the clock cut off before are measured
    python benchmarks/run.py --smoke         a few minutes; checks the benchmark, not the machine

Every cell is written as soon as it is measured, and a run that finds an unfinished file goes on with it. A cell that
cannot be measured is recorded with its reason. Before anything is timed each contender has to pass a quick check
against the definition in float64; who fails is not reported. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import claims
import plots
import tables
import worker
from contenders import ALL, CONTENDERS, Contender
from harness import Tables, brief, limit_memory, results_path, rounded, spread
from tasks import Task

MEMORY_LENGTHS = {False: (2048, 8192, 16384, 32768, 65536, 131072), True: (2048, 8192, 16384, 32768)}
BACKWARD_LENGTHS = (2048, 8192, 16384)
MANY_HEADS = 16384  # up to this length a task has 8 heads, beyond it 1
RETRY = "time is up"
TABLES = ("checks", "time", "memory", "mean")


def settled(results: Tables, table: str, **keys: Any) -> bool:
    """Whether a cell was measured, or has a reason that more time will not mend."""
    row = results.find(table, **keys)
    return row is not None and not str(row.get("not_run", "")).startswith(RETRY)


CELL = ("contender", "length", "heads", "dtype", "pass")


def passed(task: Task) -> str:
    return "forward+backward" if task.backward else "forward"


def cell(name: str, task: Task) -> dict[str, Any]:
    return {"contender": name, "length": task.length, "heads": task.heads, "dtype": task.dtype, "pass": passed(task)}


def who(arguments: argparse.Namespace) -> list[Contender]:
    return [line for line in CONTENDERS if any(part in line.name for part in arguments.only or [""])]


# ---- checks


def run_checks(results: Tables, lines: list[Contender], arguments: argparse.Namespace) -> None:
    """Speed only on green: each contender, dtype and pass once on a short task."""
    asked = worker.gate([line.name for line in lines], arguments.dtypes, (False, True), arguments.device)
    asked = [text for text in asked if not _green(results, json.loads(text))]
    for event in worker.Worker(patience=180).run({"contenders": asked, "gate": True}):
        about = json.loads(event["name"])
        wrong = event.get("wrong", event.get("reason", ""))
        which = "forward+backward" if about["backward"] else "forward"
        row = {"contender": about["name"], "dtype": about["dtype"], "pass": which, "wrong": wrong}
        results.put("checks", row, ("contender", "dtype", "pass"))
        if wrong:
            print(f"check: {about['name']} {about['dtype']} {which}: {wrong}", flush=True)


def _green(results: Tables, about: dict[str, Any]) -> bool:
    which = "forward+backward" if about["backward"] else "forward"
    row = results.find("checks", contender=about["name"], dtype=about["dtype"], **{"pass": which})
    return row is not None and not row["wrong"]


def refused(results: Tables, line: Contender, task: Task) -> str:
    """Why a cell is not measured, as far as is known beforehand; "" where it is."""
    if task.backward and not line.trains:
        return "no backward pass on a CPU: it raises where an input requires a gradient"
    if task.length > line.longest:
        return f"measured up to {line.longest:,} only"
    if task.length < line.least:
        return f"needs a length of at least {line.least}"
    row = results.find("checks", contender=line.name, dtype=task.dtype, **{"pass": passed(task)})
    if row is not None and row["wrong"]:
        return f"quick check failed: {row['wrong']}"
    return ""


# ---- time


def time_tasks(arguments: argparse.Namespace) -> Iterator[Task]:
    for backward in (False, True):
        for length in arguments.lengths:
            if backward and length not in BACKWARD_LENGTHS:
                continue
            for dtype in arguments.dtypes:
                heads = 8 if length <= MANY_HEADS else 1
                yield Task(length, heads, dtype=dtype, backward=backward, device=arguments.device)


def predicted(results: Tables, line: Contender, task: Task) -> float | None:
    """Seconds that a call will take, from the longest shorter one measured; None where nothing is known."""
    known = [row for row in results.data["time"]
             if row["contender"] == line.name and row["dtype"] == task.dtype and row["pass"] == passed(task)
             and "median_s" in row and row["length"] < task.length]  # fmt: skip
    if not known:
        return None
    last = max(known, key=lambda row: row["length"])
    return last["median_s"] / last["heads"] * task.heads * (task.length / last["length"]) ** line.order


def run_time(results: Tables, lines: list[Contender], arguments: argparse.Namespace, deadline: float) -> None:
    for task in time_tasks(arguments):
        todo = []
        for line in lines:
            row = cell(line.name, task)
            if settled(results, "time", **row):
                continue
            reason = refused(results, line, task)
            shorter = [length for length in arguments.lengths if length < task.length]
            failed = next((old for length in shorter for old in [_failure(results, line, task, length)] if old), "")
            expected = predicted(results, line, task)
            if not reason and failed:
                reason = f"already at a shorter length: {failed}"
            if not reason and expected is not None and expected > arguments.call_limit:
                reason = f"a call would take about {expected:.0f} s, limit {arguments.call_limit:.0f} s"
            if not reason and time.monotonic() > deadline:
                reason = RETRY
            if reason:
                results.put("time", {**row, "not_run": reason}, CELL)
            else:
                todo.append(line.name)
        if not todo:
            continue
        request = {"task": asdict(task), "contenders": todo, "seconds": arguments.seconds, "most": arguments.repeats}
        process = worker.Worker(patience=max(60, 6 * arguments.call_limit), deadline=deadline)
        started = time.monotonic()
        for event in process.run(request):
            if event["at"] == "mean":
                keys = ("length", "heads", "dtype")
                about = {"length": task.length, "heads": task.heads, "dtype": task.dtype}
                results.put("mean", {**about, "error_full": event["value"]}, keys)
                continue
            row = cell(event["name"], task)
            if event["at"] == "done":
                found = {name: value for name, value in event.items() if name.startswith("error")}
                row |= {**spread(event["times"]), "first_s": event["first"], **found}
            else:
                row["not_run"] = RETRY if event["at"] == "late" else event["reason"]
            results.put("time", rounded(row), CELL)
        took = time.monotonic() - started
        print(
            f"time: N={task.length} H={task.heads} {task.dtype} {passed(task)}: {len(todo)} in {took:.0f} s", flush=True
        )


def _failure(results: Tables, line: Contender, task: Task, length: int) -> str:
    """A failure of the same contender at a shorter length that a longer one will not mend."""
    heads = 8 if length <= MANY_HEADS else 1
    row = results.find(
        "time", contender=line.name, length=length, heads=heads, dtype=task.dtype, **{"pass": passed(task)}
    )
    reason = (row or {}).get("not_run", "")
    hopeless = any(word in reason for word in ("worker ended", "silence", "memory"))
    return reason if hopeless and task.heads >= heads else ""


# ---- memory


def run_memory(results: Tables, lines: list[Contender], arguments: argparse.Namespace, deadline: float) -> None:
    """One head at every length, so that the growth of a call can be followed; a fresh process for each contender."""
    kinds = [(dtype, False) for dtype in arguments.dtypes] + [(arguments.dtypes[0], True)]
    for line in lines:
        cases = []
        for dtype, backward in kinds:
            for length in MEMORY_LENGTHS[backward]:
                if length not in arguments.lengths:
                    continue
                task = Task(length, 1, dtype=dtype, backward=backward, device=arguments.device)
                row = cell(line.name, task)
                if settled(results, "memory", **row):
                    continue
                reason = refused(results, line, task)
                expected = predicted(results, line, task) or 0.0
                if not reason and expected > arguments.call_limit:
                    reason = f"a call would take about {expected:.0f} s, limit {arguments.call_limit:.0f} s"
                if reason:
                    results.put("memory", {**row, "not_run": reason}, CELL)
                else:
                    cases.append((row, task))
        _memory_of(results, line, cases, arguments, deadline)


def _memory_of(
    results: Tables,
    line: Contender,
    cases: list[tuple[dict[str, Any], Task]],
    arguments: argparse.Namespace,
    deadline: float,
) -> None:
    started = time.monotonic()
    for batch in _batches(cases):
        batch = [case for case in batch if not settled(results, "memory", **case[0])]
        if not batch:
            continue
        if time.monotonic() > deadline:
            for row, _ in batch:
                results.put("memory", {**row, "not_run": RETRY}, CELL)
            continue
        timeout = max(10.0, min(60 + 20 * arguments.call_limit, deadline - time.monotonic()))
        try:
            grown = worker.memory(line.name, [task for _, task in batch], timeout=timeout)
        except Exception as error:
            if len(batch) == 1:
                reason = RETRY if time.monotonic() > deadline else brief(error)
                results.put("memory", {**batch[0][0], "not_run": reason}, CELL)
            continue
        for (row, _), growth in zip(batch, grown, strict=True):
            results.put("memory", {**row, "growth_bytes": growth}, CELL)
    if cases:
        print(f"memory: {line.name}: {len(cases)} in {time.monotonic() - started:.0f} s", flush=True)


def _batches(cases: list[Any]) -> list[list[Any]]:
    """All in one process, since loading torch is most of the time; then, where that failed, one by one."""
    return [cases] if len(cases) < 2 else [cases, *([case] for case in cases)]


# ---- the command


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(ALL))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", help="contenders whose names contain one of these")
    parser.add_argument(
        "--parts", nargs="+", default=["time", "memory", "claims"], choices=["time", "memory", "claims"]
    )
    parser.add_argument(
        "--minutes", type=float, default=25.0, help="what is not reached in this time is left for the next run"
    )
    parser.add_argument("--call-limit", type=float, default=12.0, help="seconds that one call may take")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of repeats for each cell")
    parser.add_argument("--repeats", type=int, default=9, help="repeats at most")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--fresh", action="store_true", help="begin a new file instead of going on with the newest")
    parser.add_argument(
        "--smoke", action="store_true", help="short lengths, few repeats, results under the theme 'smoke'"
    )
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.lengths, arguments.seconds, arguments.repeats, arguments.minutes = [512, 2048], 0.05, 3, 10.0
        arguments.parts = [part for part in arguments.parts if part != "claims"]
    arguments.lengths.sort()
    return arguments


def main() -> int:
    arguments = parse()
    limit_memory()
    start = time.monotonic()
    deadline = start + 60 * arguments.minutes
    # the clock is shared out, so that one part cannot eat another
    shares = {"claims": 0.25, "time": 0.75, "memory": 1.0}
    theme = "smoke" if arguments.smoke else "attention"
    path = results_path(theme, arguments.device, fresh=arguments.fresh)
    results = Tables(path, TABLES, arguments.device)
    lines = who(arguments)
    if "claims" in arguments.parts:
        claims.run_all(deadline=start + shares["claims"] * 60 * arguments.minutes, fresh=arguments.fresh)
    if {"time", "memory"} & set(arguments.parts):
        run_checks(results, lines, arguments)
    if "time" in arguments.parts:
        run_time(results, lines, arguments, start + shares["time"] * 60 * arguments.minutes)
    if "memory" in arguments.parts:
        run_memory(results, lines, arguments, deadline)
    left = [row for table in ("time", "memory") for row in results.data[table] if row.get("not_run") == RETRY]
    results.save()
    print(f"{results.path.name}: {len(results.data['time'])} cells of time, {len(results.data['memory'])} of memory, "
          f"{len(left)} left for the next run; {(time.monotonic() - start) / 60:.1f} minutes")  # fmt: skip
    if not arguments.smoke:
        plots.main()
        tables.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
