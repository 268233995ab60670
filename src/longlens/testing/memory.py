"""Peak memory growth of a call, measured in a fresh process.

    peak_growth("my_module:build", {"length": 16384})

where `build(length=...)` makes the inputs and returns a function without arguments, the call to be measured. Memory
that is allocated when `build` returns is subtracted, so that the result is the need of the call itself: scratch, saved
tensors and output.

On the CPU the peak resident set of the process is read; the C allocator returns freed blocks to the system at once, so
that one measurement does not affect the next. On CUDA the peak of the caching allocator is read.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from longlens.errors import InputError, LonglensError

MIB = 1024 * 1024
LINEAR = 2.1  # the largest growth(2N) / growth(N) that counts as linear; quadratic growth gives 4


def peak_growth(
    target: str,
    kwargs: Mapping[str, Any],
    *,
    device: str = "cpu",
    warm_up: Mapping[str, Any] | None = None,
    runs: int = 3,
    path: Sequence[str] = (),
    timeout: float = 600.0,
) -> int:
    """Peak growth, in bytes, of the call that `target(**kwargs)` returns.

    Args:
        target: "module:function"; the function makes inputs and returns a function without arguments.
        kwargs: its arguments, which must be values that JSON can represent.
        device: "cpu" or "cuda": which allocator's peak to read. `target` must put its tensors there itself.
        warm_up: arguments that differ in a first, small, unmeasured call, such as {"length": 64}, which starts thread
            pools and loads libraries. None means that the measured call is run once before.
        runs: measured runs, of which the median counts. Memory that an early run retains counts in the later ones.
        path: folders to put in front of the import path.
        timeout: seconds.

    Raises:
        InputError: a target that is not "module:function".
        LonglensError: the measured process failed; the message ends with the last lines of its standard error.
    """
    return peak_growths(target, [kwargs], device=device, warm_up=warm_up, runs=runs, path=path, timeout=timeout)[0]


def peak_growths(
    target: str,
    cases: Sequence[Mapping[str, Any]],
    *,
    device: str = "cpu",
    warm_up: Mapping[str, Any] | None = None,
    runs: int = 3,
    path: Sequence[str] = (),
    timeout: float = 600.0,
) -> list[int]:
    """`peak_growth` of several cases, one after another in one fresh process (loading torch is most of the time)."""
    _split(target)
    if device == "cpu" and sys.platform != "linux" and len(cases) > 1:
        # only Linux can reset the peak of a process
        return [
            peak_growth(target, case, device=device, warm_up=warm_up, runs=runs, path=path, timeout=timeout)
            for case in cases
        ]
    folders = [*path, *(entry or str(Path.cwd()) for entry in sys.path)]
    request = {
        "target": target,
        "cases": [dict(case) for case in cases],
        "device": device,
        "warm_up": None if warm_up is None else dict(warm_up),
        "runs": runs,
        "path": folders,
    }
    # blocks of 16 KiB and more are mapped singly and unmapped when freed, so that a fragmented heap does not count;
    # smaller blocks are in one arena
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "16384",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        "PYTHONPATH": os.pathsep.join(folders),
    }
    child = subprocess.run(
        [sys.executable, "-m", "longlens.testing.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
        check=False,
    )
    if child.returncode:
        last_lines = child.stderr.strip().splitlines()[-12:] or [f"exit status {child.returncode}"]
        raise LonglensError(f"measuring {target} failed: {last_lines[-1]}\n" + "\n".join(last_lines))
    answer: list[int] = json.loads(child.stdout.splitlines()[-1])
    return answer


def import_function(target: str) -> Callable[..., Any]:
    """The function that "module:function" names. Raises `InputError` if there is none."""
    imported = import_object(target)
    if not callable(imported):
        raise InputError(f"'{target}' is a {type(imported).__name__}, not a function")
    return imported


def import_object(target: str) -> Any:
    """The object that "module:name" names. Raises `InputError` if there is no such module or name."""
    module, name = _split(target)
    try:
        imported: Any = import_module(module)
    except ModuleNotFoundError as error:
        # the module exists, but one that it imports does not
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise InputError(f"no module '{module}' (in '{target}'): expected one on the import path") from None
    for part in name.split("."):
        if not hasattr(imported, part):
            raise InputError(f"module '{module}' has no '{name}'; expected MODULE:NAME of something in it")
        imported = getattr(imported, part)
    return imported


def _split(target: str) -> tuple[str, str]:
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise InputError(f"expected MODULE:FUNCTION, got '{target}'")
    return module, name


def attention_call(
    function: str,
    *,
    length: int,
    heads: int = 4,
    width: int = 64,
    value_width: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    causal: bool | None = False,
    backward: bool = False,
    padding: int = 0,
    key_mask: str = "key_mask",
    sinks: bool = False,
    keywords: Mapping[str, Any] | None = None,
) -> Callable[[], object]:
    """A `target` for `peak_growth`: one call of an attention function on normal inputs (1, heads, length, width).

    `causal` is passed as `is_causal` unless None; `backward` adds the gradient with respect to query, key and value;
    `padding` > 0 masks so many keys at the end by the keyword `key_mask`; `sinks` gives each head a sink, which
    `backward` differentiates too; `keywords` are passed on.
    """
    import torch

    attend = import_function(function)
    kind = getattr(torch, dtype)
    torch.manual_seed(0)

    def draw(last: int) -> torch.Tensor:
        return torch.randn(1, heads, length, last, dtype=kind, device=device).requires_grad_(backward)

    tensors = draw(width), draw(width), draw(value_width or width)
    arguments: dict[str, Any] = dict(keywords or {})
    if causal is not None:
        arguments["is_causal"] = causal
    if padding:
        arguments[key_mask] = (torch.arange(length, device=device) < length - padding).unsqueeze(0)
    leaves: tuple[torch.Tensor, ...] = tensors
    if sinks:
        arguments["sinks"] = torch.zeros(heads, dtype=kind, device=device).requires_grad_(backward)
        leaves = (*tensors, arguments["sinks"])
    weight = torch.ones(1, heads, length, value_width or width, dtype=kind, device=device) if backward else None

    def call() -> object:
        with torch.set_grad_enabled(backward):
            out = attend(*tensors, **arguments)
            return torch.autograd.grad(out, leaves, weight) if backward else out

    return call


def _measure(request: dict[str, Any]) -> list[int]:
    """Run the measurements of a request; called in the fresh process."""
    build = import_function(request["target"])
    growth, reset = _meters(request["device"])
    if request["warm_up"] is not None:
        build(**(request["cases"][0] | request["warm_up"]))()
    growths = []
    for case in request["cases"]:
        call = build(**case)
        if request["warm_up"] is None:
            call()
        measured = []
        start = reset()
        for _ in range(request["runs"]):
            reset()
            call()
            measured.append(growth() - start)
        growths.append(max(0, round(statistics.median(measured))))
        del call
    return growths


def _meters(device: str) -> tuple[Callable[[], int], Callable[[], int]]:
    """Two functions: one reads the peak, one resets it and returns what is allocated now; both in bytes."""
    if device.startswith("cuda"):
        import torch

        def reset_cuda() -> int:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()

        def peak_cuda() -> int:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()

        return peak_cuda, reset_cuda
    if sys.platform != "linux":
        return _rusage, _rusage

    def reset_resident() -> int:
        gc.collect()
        # only glibc has this function; other C libraries return freed memory by different rules
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        # if the kernel forbids the reset, the peak of the whole process counts, which the small warm-up keeps low
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")

    return lambda: _status("VmHWM"), reset_resident


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LonglensError(f"/proc/self/status has no {field}")


def _rusage() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    arguments = json.load(sys.stdin)
    sys.path[:0] = [entry for entry in arguments["path"] if entry not in sys.path]
    print(json.dumps(_measure(arguments)))
