"""What a step gets: the device, its sizes, its deadline, and where measurements are recorded."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from harness import append_line, brief, clock, interleave, peak_bytes, ratio, reset_peak, rounded, spread

T = TypeVar("T")
TIME_UP = "time was up"


@dataclass
class Setup:
    """One step's run. `dry`: tiny sizes, on the CPU, to see that everything works."""

    step: str
    device: str
    dry: bool
    deadline: float
    log: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def pick(self, full: T, dry: T) -> T:
        """A size: `dry` in a dry run."""
        return dry if self.dry else full

    @property
    def late(self) -> bool:
        """Whether the step's time is up."""
        return time.monotonic() > self.deadline

    def record(self, name: str, **values: Any) -> None:
        """Write one measurement, at once."""
        row = {"step": self.step, "name": name, **rounded(values)}
        self.rows.append(row)
        append_line(self.log, row)
        print(json.dumps(row)[:240], flush=True)

    def measure(self, name: str, function: Callable[[], Mapping[str, Any]], *, optional: bool = False) -> None:
        """Record what `function` returns; its error instead where it raises, and the next measurement goes on.

        `optional`: what this machine may lack: its error is recorded as a reason, not as an error.
        """
        if self.late:
            self.record(name, not_run=TIME_UP)
            return
        begun = time.monotonic()
        try:
            values = dict(function())
        except Exception as error:
            self.fail(name, error, optional=optional)
            return
        self.record(name, **values, took_s=time.monotonic() - begun)

    def fail(self, name: str, error: Exception, *, optional: bool = False) -> None:
        """Record that a measurement could not be made, and let go of the memory that it held."""
        self.record(name, **{"not_run" if optional else "error": brief(error)})
        if self.device == "cuda":
            # after some errors nothing works any more on the device until the process ends
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def draw(self, *shape: int, dtype: str = "float32", seed: int = 0, grad: bool = False) -> torch.Tensor:
        """Standard normal numbers, drawn on the device, which is much the quicker for large ones."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(*shape, generator=generator, device=self.device)
        return drawn.to(getattr(torch, dtype)).requires_grad_(grad)

    def compare(
        self,
        name: str,
        builds: Mapping[str, Callable[[], Callable[[], object]]],
        *,
        base: str,
        optional: Collection[str] = (),
        rounds: int = 7,
        **about: Any,
    ) -> None:
        """Time contenders on the same work in turn; a row for each, with how many times as long as `base` it takes.

        Each of `builds` makes inputs and returns the call. A short call is repeated until it fills 2 ms, since waiting
        for the device costs some 10 us.
        """
        if self.late:
            self.record(name, **about, not_run=TIME_UP)
            return
        now = clock(self.device)
        calls: dict[str, Callable[[], object]] = {}
        counts: dict[str, int] = {}
        for contender, build in builds.items():
            try:
                call = build()
                call()
                begun = now()
                call()
                counts[contender] = max(1, min(200, math.ceil(2e-3 / max(now() - begun, 1e-7))))
                calls[contender] = call
            except Exception as error:
                self.fail(f"{name}: {contender}", error, optional=contender in optional)
        if self.dry:
            rounds, counts = 2, dict.fromkeys(counts, 1)
        repeated = {one: (lambda one=one: [calls[one]() for _ in range(counts[one])]) for one in calls}
        try:
            taken = interleave(repeated, rounds, device=self.device, deadline=self.deadline)
        except Exception as error:
            self.fail(name, error)
            return
        seconds = {one: [value / counts[one] for value in values] for one, values in taken.items()}
        for one, values in seconds.items():
            beside = ratio(values, seconds[base]) if base in seconds else {}
            self.record(f"{name}: {one}", **about, **spread(values), **beside)

    def growth(self, call: Callable[[], object]) -> int:
        """Peak bytes that a call holds beyond what is held before it; a first call is not counted."""
        call()
        if self.device == "cuda":
            return max(self._growth_on_device(call) for _ in range(2))
        # collecting would be most of a dry run's time
        before = reset_peak(collect=not self.dry)
        call()
        return max(0, peak_bytes() - before)

    def _growth_on_device(self, call: Callable[[], object]) -> int:
        """Gradients of the call before may still be held by the thread that made them: freed during this call, they
        would make it seem smaller."""
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def gradients(call: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """Forward and backward of a call whose output has a gradient."""
    weight: list[torch.Tensor] = []

    def both() -> object:
        out = call()
        if not weight:
            weight.append(torch.randn_like(out))
        return torch.autograd.grad(out, leaves, weight[0])

    return both


def list_of_methods() -> list[str]:
    """String forms of the methods that the tests run, with parameters for short inputs."""
    import sys

    tests = Path(__file__).resolve().parents[2] / "tests"
    sys.path.append(str(tests))
    try:
        from methods import METHODS
    finally:
        sys.path.remove(str(tests))
    return [str(method) for method in METHODS]
