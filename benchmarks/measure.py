"""Time, peak memory and error of contenders. `run.py` and `claims.py` are built on it.

Times are taken in a worker process of their own, all contenders of a task in one round after another, so that drift of
the machine hits all alike; the parent watches and ends a worker that hangs or outgrows its memory.

    python benchmarks/measure.py < request.json      what the worker does; one JSON line per event
"""

from __future__ import annotations

import gc
import json
import os
import platform
import queue
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROWS = 64
GRACE = 60.0  # seconds beyond the deadline for a call that is under way
GATE_LENGTH = 512  # or the shortest that a contender takes
# relative error on GATE_LENGTH tokens above which nothing of a contender is reported: it computes something else
GATE = {"float32": 1e-4, "bfloat16": 2e-2}
GATE_APPROXIMATE = {"float32": 1e-3, "bfloat16": 1e-1}
PACKAGES = (
    "longlens", "torch", "numpy", "transformers",
    "performer-pytorch", "linformer", "nystrom-attention", "local-attention",
)  # fmt: skip


# ---- the machine


def memory_total() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit_memory(share: float = 0.8) -> int:
    """Let this process and those it starts take `share` of the machine's memory each; beyond that they fail, by
    themselves.
    """
    most = int(memory_total() * share)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    return most


def _cpu() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    have = flags.group(1).split() if flags else []
    return model.group(1).strip() if model else platform.machine(), [flag for flag in wanted if flag in have]


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE, check=False)
    return answer.stdout.strip()


def facts(device: str = "cpu") -> dict[str, Any]:
    """What the figures were taken on. No host names, no paths."""
    import torch

    model, flags = _cpu()
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "cpu": model,
        "cpu_flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_total() / 2**30, 1),
        "gpu": gpu,
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": found,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--", "../src") else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def hardware(device: str = "cpu") -> str:
    """A slug for file names: "amd-epyc-2c"."""
    about = facts(device)
    name = about["gpu"] or f"{about['cpu']} {about['cores']}c"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---- the definition, on sampled rows


class Definition:
    """Rows of softmax attention in float64, and of its query gradient, for a task's inputs; never N x N."""

    def __init__(self, task: Any, rows: int = ROWS) -> None:
        import torch

        self.task = task
        generator = torch.Generator().manual_seed(1)
        # the first and the last row always: global tokens and edges are there
        drawn = torch.randperm(task.length - 2, generator=generator)[: rows - 2].sort().values + 1
        self.rows = torch.cat([torch.tensor([0]), drawn, torch.tensor([task.length - 1])]).to(task.device)
        self._known: dict[tuple[str, int | None], Any] = {}

    def _keep(self, pairs: str) -> Any:
        """(H|1, rows, N) bool, or None: which pairs `pairs` names."""
        import torch

        from contenders import keep, pattern

        place = torch.arange(self.task.length, device=self.task.device)
        if pairs == "all":
            return None
        if pairs == "padded":
            return keep(self.task)[0].expand(1, len(self.rows), -1)
        if pairs == "causal":
            return (place[None] <= self.rows[:, None])[None]
        allowed = pattern(pairs, self.task.length).allowed(self.rows[:, None], place[None], self.task.length)
        return allowed.reshape(-1, *allowed.shape[-2:])

    def of(self, pairs: str, value_width: int | None = None) -> tuple[Any, Any]:
        """Output (H, rows, Dv) and query gradient (H, rows, D) for `output_gradient`, float64."""
        import torch

        if (pairs, value_width) in self._known:
            return self._known[pairs, value_width]
        q, k, v = self.task.draw(value_width)
        above = output_gradient(self.task, value_width or self.task.width)
        keep = self._keep(pairs)
        outputs, grads = [], []
        for head in range(self.task.heads):
            key, value = k[0, head].double(), v[0, head].double()
            scores = q[0, head, self.rows].double() @ key.T * self.task.width**-0.5
            if keep is not None:
                scores = scores.masked_fill(~keep[head % keep.shape[0]], -torch.inf)
            weights = scores.softmax(-1)
            out = weights @ value
            up = above[0, head, self.rows].double()
            slope = weights * (up @ value.T - (up * out).sum(-1, keepdim=True))
            outputs.append(out)
            grads.append(slope @ key * self.task.width**-0.5)
        self._known[pairs, value_width] = torch.stack(outputs), torch.stack(grads)
        return self._known[pairs, value_width]

    def mean_of_values(self) -> float:
        """Relative error of returning the mean of the values everywhere: what an approximator has to beat."""
        want = self.of("all")[0]
        v = self.task.draw()[2][0].double()
        return relative(v.mean(1, keepdim=True).expand_as(want), want)


def output_gradient(task: Any, width: int) -> Any:
    """What is fed to the backward pass: (1, H, N, width), standard normal."""
    import torch

    generator = torch.Generator().manual_seed(2)
    shape = (1, task.heads, task.length, width)
    return torch.randn(shape, generator=generator).to(task.device, getattr(torch, task.dtype))


def relative(got: Any, want: Any) -> float:
    """|got - want| / |want| (Frobenius), in float64."""
    return float((got.double() - want).norm() / want.norm())


# ---- one call


def prepare(contender: str, task: dict[str, Any] | None = None, **more: Any) -> Callable[[], object]:
    """What is timed, and what `longlens.testing.memory.peak_growth` measures: forward, or forward and backward."""
    import torch

    from contenders import BY_NAME, Task, build

    task_ = Task(**{**(task or {}), **more})
    call = build(contender, task_)
    if not task_.backward:

        def forward() -> object:
            with torch.no_grad():
                return call.run()

        return forward
    with torch.no_grad():
        width = BY_NAME[contender].value_width or task_.width
        above = output_gradient(task_, width)
    shaped: list[Any] = []

    def both() -> object:
        out = call.run()
        if not shaped:
            shaped.append(_like(out, above, call))
        return torch.autograd.grad(out, call.leaves, shaped[0])

    return both


def _like(out: Any, above: Any, call: Any) -> Any:
    """`above` (1, H, N, D) in the layout of `out`."""
    if out.shape == above.shape:
        return above
    if out.ndim == 3 and out.shape[0] == 1:
        return above.transpose(1, 2).flatten(2).contiguous()
    raise ValueError(f"no layout known for an output of shape {tuple(out.shape)}")


def errors(contender: str, task: Any, definition: Definition) -> dict[str, float | None]:
    """Relative error on the sampled rows against the float64 definition.

    `error`: against what the contender says it computes (its own pairs); `error_full`: against attention over all
    pairs; with a backward pass also `error_query_grad`.
    """
    import torch

    from contenders import BY_NAME, build

    line = BY_NAME[contender]
    if line.pairs == "":
        return {"error": None, "error_full": None}
    call = build(contender, task)
    with torch.set_grad_enabled(task.backward):
        raw = call.run()
    out = call.output(raw.detach())[0][:, definition.rows]
    want, want_grad = definition.of(line.pairs, line.value_width)
    found: dict[str, float | None] = {
        "error": relative(out, want),
        "error_full": relative(out, definition.of("all", line.value_width)[0]),
    }
    if task.backward:
        above = _like(raw, output_gradient(task, out.shape[-1]), call)
        grads = torch.autograd.grad(raw, call.leaves, above)
        found["error_query_grad"] = relative(call.query_grad(grads)[0][:, definition.rows], want_grad)
    return found


def check(contender: str, task: Any, definition: Definition) -> str:
    """What is wrong with a contender on a short task; "" where nothing is. Speed only on green."""
    import torch

    from contenders import BY_NAME, build

    line = BY_NAME[contender]
    call = build(contender, task)
    with torch.set_grad_enabled(task.backward):
        raw = call.run()
    out = call.output(raw.detach())
    want = (1, task.heads, task.length, line.value_width or task.width)
    if tuple(out.shape) != want:
        return f"output of shape {tuple(out.shape)}, expected {want}"
    if not bool(out.isfinite().all()):
        return "the output is not finite"
    if line.pairs == "":
        return ""
    if line.exact:
        found = errors(contender, task, definition)
        limit = GATE[task.dtype]
        bad = [f"{name} {value:.2g}" for name, value in found.items()
               if name != "error_full" and value is not None
               and not value <= limit * (4 if "grad" in name else 1)]  # fmt: skip
        return f"relative {' and '.join(bad)} against float64, limit {limit}" if bad else ""
    if line.ours and hasattr(line.build, "args"):
        from longlens.ops.inputs import check_inputs
        from longlens.ops.registry import parse_method

        if not line.build.args:
            return ""
        tensors = [tensor.double() for tensor in task.draw()]
        inputs = check_inputs(*tensors, None, 0.0, False, None, None, None, None, False)
        error = relative(out, parse_method(line.build.args[0]).reference(inputs))
        limit = GATE_APPROXIMATE[task.dtype]
        return f"relative error {error:.2g} against its own definition, limit {limit}" if not error <= limit else ""
    return ""


# ---- the worker


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def _clock(task: Any) -> Callable[[], float]:
    if task.device != "cuda":
        return time.perf_counter
    import torch

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def brief(error: BaseException) -> str:
    """One line, without paths of this machine."""
    text = " ".join(str(error).split())
    for hidden in (str(HERE.parent), str(Path.home()), sys.prefix):
        text = text.replace(hidden, "")
    return f"{type(error).__name__}: {text[:200]}"


def _repeats(first: float, seconds: float, most: int) -> int:
    """Enough for `seconds`, 3 at least, `most` at most; slow calls are measured once or twice."""
    if first > seconds:
        return 1 if first > 2 * seconds else 2
    return max(3, min(most, int(seconds / max(first, 1e-6))))


def gate(names: Sequence[str], dtypes: Sequence[str], passes: Sequence[bool], device: str = "cpu") -> list[str]:
    """What the gate is asked: each contender, dtype and pass that it has, as one JSON string."""
    from contenders import BY_NAME

    return [
        json.dumps({"name": name, "dtype": dtype, "backward": backward, "device": device})
        for dtype in dtypes
        for backward in passes
        for name in names
        if BY_NAME[name].trains or not backward
    ]


def _gate(asked: Sequence[str]) -> None:
    from contenders import BY_NAME, Task

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
    from contenders import Task

    if "gate" in request:
        _gate(request["contenders"])
        return
    end = time.monotonic() + request["left_s"] if "left_s" in request else float("inf")
    task = Task(**request["task"])
    clock = _clock(task)
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
            started = clock()
            call()
            firsts[name] = clock() - started
            from contenders import BY_NAME

            quick = firsts[name]
            if quick <= 2 * request["seconds"] or BY_NAME[name].compiled:
                # the first call may compile or touch memory for the first time
                started = clock()
                call()
                quick = clock() - started
            even = request.get("even")
            wanted[name] = request["most"] if even else _repeats(quick, request["seconds"], request["most"])
            calls[name], times[name] = call, []
            if wanted[name] == 1:
                times[name].append(quick)
            gc.collect()
        except Exception as error:
            _say(at="failed", name=name, reason=brief(error))
    for turn in range(request["most"]):
        # every second round backwards, so that nobody always follows the same neighbour
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            if len(times[name]) >= wanted[name] or (times[name] and time.monotonic() > end):
                continue
            _say(at="time", name=name)
            started = clock()
            calls[name]()
            times[name].append(clock() - started)
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
            [sys.executable, str(HERE / "measure.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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


def spread(times: Sequence[float]) -> dict[str, float]:
    return {"median_s": statistics.median(times), "low_s": min(times), "high_s": max(times), "repeats": len(times)}


def memory(contender: str, tasks: Sequence[Any], *, timeout: float = 120.0) -> list[int]:
    """Peak growth in bytes of a call on each task, one after another in a fresh process."""
    from contenders import BY_NAME
    from longlens.testing.memory import peak_growths

    line = BY_NAME[contender]
    # what is loaded or set up at the first call of a dtype or pass must not count: a short call before, not reported
    cases: list[Any] = []
    wanted: list[bool] = []
    for task in tasks:
        if not cases or (task.dtype, task.backward) != (cases[-1].dtype, cases[-1].backward):
            cases.append(replace(task, length=max(512, line.least)))
            wanted.append(False)
        cases.append(task)
        wanted.append(True)
    # a compiled contender compiles for each length: there each measured call itself runs once before
    grown = peak_growths(
        "measure:prepare", [{"contender": contender, "task": asdict(case)} for case in cases],
        device=tasks[0].device, warm_up=None if line.compiled else {}, runs=1, path=[str(HERE)], timeout=timeout,
    )  # fmt: skip
    return [growth for growth, counts in zip(grown, wanted, strict=True) if counts]


if __name__ == "__main__":
    try:
        work(json.loads(sys.stdin.read()))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
