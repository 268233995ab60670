"""Times and memory of attention contenders in processes of their own; `run.py` and `claims.py` are built on it.

All contenders of a task are timed in one worker process, round after round, so that drift of the machine hits all
alike. The parent watches, and ends a worker that hangs or outgrows its memory.

    python benchmarks/worker.py < request.json      what the worker does; one JSON line for each event
"""

from __future__ import annotations

import gc
import json
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from contenders import BY_NAME
from correctness import GATE_LENGTH, Definition, check, errors, prepare
from harness import HERE, brief, clock, order_of
from longlens.testing import peak_growths
from tasks import Task

GRACE = 60.0  # seconds beyond the deadline for a call that is under way


# ---- the worker


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def _repeats(first: float, seconds: float, most: int) -> int:
    """Enough for `seconds`, 3 at least, `most` at most; slow calls are measured once or twice."""
    if first > seconds:
        return 1 if first > 2 * seconds else 2
    return max(3, min(most, int(seconds / max(first, 1e-6))))


def gate(names: Sequence[str], dtypes: Sequence[str], passes: Sequence[bool], device: str = "cpu") -> list[str]:
    """What the gate is asked: each contender, dtype and pass that it has, as one JSON string."""
    return [
        json.dumps({"name": name, "dtype": dtype, "backward": backward, "device": device})
        for dtype in dtypes
        for backward in passes
        for name in names
        if BY_NAME[name].trains or not backward
    ]


def _gate(asked: Sequence[str]) -> None:
    definitions: dict[Any, Definition] = {}
    for text in asked:
        _say(at="check", name=text)
        about = json.loads(text)
        line = BY_NAME[about.pop("name")]
        task = Task(max(GATE_LENGTH, line.least), 2, **about)
        try:
            definition = definitions.setdefault(task, Definition(task))
            _say(at="done", name=text, wrong=check(line.name, task, definition))
        except Exception as error:
            _say(at="done", name=text, wrong=brief(error))


def work(request: dict[str, Any]) -> None:
    """Time `request["contenders"]` on `request["task"]`, round after round, then take their errors."""
    if "gate" in request:
        _gate(request["contenders"])
        return
    end = time.monotonic() + request["left_s"] if "left_s" in request else float("inf")
    task = Task(**request["task"])
    now = clock(task.device)
    definition = Definition(task)
    calls: dict[str, Callable[[], object]] = {}
    times: dict[str, list[float]] = {}
    wanted: dict[str, int] = {}
    firsts: dict[str, float] = {}
    for name in request["contenders"]:
        if time.monotonic() > end:
            _say(at="late", name=name)
            continue
        _say(at="build", name=name)
        try:
            call = prepare(name, asdict(task))
            started = now()
            call()
            firsts[name] = now() - started
            quick = firsts[name]
            if quick <= 2 * request["seconds"] or BY_NAME[name].compiled:
                # the first call may compile or touch memory for the first time
                started = now()
                call()
                quick = now() - started
            even = request.get("even")
            wanted[name] = request["most"] if even else _repeats(quick, request["seconds"], request["most"])
            calls[name], times[name] = call, []
            if wanted[name] == 1:
                times[name].append(quick)
            gc.collect()
        except Exception as error:
            _say(at="failed", name=name, reason=brief(error))
    for turn in range(request["most"]):
        for name in order_of(list(calls), turn):
            if len(times[name]) >= wanted[name] or (times[name] and time.monotonic() > end):
                continue
            _say(at="time", name=name)
            started = now()
            calls[name]()
            times[name].append(now() - started)
    calls.clear()
    gc.collect()
    for name, taken in times.items():
        _say(at="error", name=name)
        found: dict[str, Any] = {}
        try:
            found = errors(name, task, definition) if request.get("errors", True) else {}
        except Exception as error:
            found = {"error_reason": brief(error)}
        _say(at="done", name=name, times=taken, first=firsts[name], **found)
    if request.get("errors", True):
        _say(at="mean", value=definition.mean_of_values())


# ---- the parent


class Worker:
    """Runs a request in a worker, again and again without whoever brings it down."""

    def __init__(self, *, patience: float = 120.0, deadline: float | None = None) -> None:
        self.patience = patience
        self.deadline = deadline

    def run(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Events "done", "failed" (with `reason`) and "mean"; "late" for what the deadline cut off."""
        left = list(request["contenders"])
        while left:
            at: dict[str, Any] = {"name": None, "at": "start"}
            why = ""
            more = {} if self.deadline is None else {"left_s": self.deadline - time.monotonic()}
            for event in self._events({**request, "contenders": list(left), **more}):
                if event["at"] == "ended":
                    why = event["why"]
                    break
                if event["at"] in ("done", "failed", "late"):
                    left.remove(event["name"])
                    yield event
                elif event["at"] == "mean":
                    yield event
                else:
                    at = event
            if not left:
                return
            if why == "late":
                for name in left:
                    yield {"at": "late", "name": name}
                return
            guilty = at["name"] if at["name"] in left else left[0]
            left.remove(guilty)
            yield {"at": "failed", "name": guilty, "reason": f"{why} at '{at['at']}'"}

    def _events(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        worker = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(request))
        worker.stdin.close()
        lines: queue.Queue[str] = queue.Queue()
        stdout = worker.stdout

        def read() -> None:
            for line in stdout:
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()
        try:
            while True:
                left = self.patience
                if self.deadline is not None:
                    # the worker minds the deadline itself; this is for a call that outlasts it
                    left = min(left, self.deadline + GRACE - time.monotonic())
                try:
                    line = lines.get(timeout=max(0.0, left))
                except queue.Empty:
                    late = self.deadline is not None and time.monotonic() >= self.deadline
                    yield {"at": "ended", "why": "late" if late else f"stopped after {self.patience:.0f} s of silence"}
                    return
                if not line:
                    status = worker.wait()
                    yield {"at": "ended", "why": "worker finished" if status == 0 else f"worker ended with {status}"}
                    return
                if line.startswith("{"):
                    yield json.loads(line)
        finally:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


def memory(contender: str, tasks: Sequence[Task], *, timeout: float = 120.0) -> list[int]:
    """Peak growth in bytes of a call on each task, one after another in a fresh process."""
    from contenders import BY_NAME

    line = BY_NAME[contender]
    # what is loaded or set up at the first call of a dtype or pass must not count: a short call before, not reported
    cases: list[Task] = []
    wanted: list[bool] = []
    for task in tasks:
        if not cases or (task.dtype, task.backward) != (cases[-1].dtype, cases[-1].backward):
            cases.append(replace(task, length=max(512, line.least)))
            wanted.append(False)
        cases.append(task)
        wanted.append(True)
    # a compiled contender compiles for each length: there each measured call itself runs once before
    grown = peak_growths(
        "correctness:prepare", [{"contender": contender, "task": asdict(case)} for case in cases],
        device=tasks[0].device, warm_up=None if line.compiled else {}, runs=1, path=[str(HERE)], timeout=timeout,
    )  # fmt: skip
    return [growth for growth, counts in zip(grown, wanted, strict=True) if counts]


if __name__ == "__main__":
    try:
        work(json.loads(sys.stdin.read()))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
