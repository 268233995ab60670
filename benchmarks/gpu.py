"""Everything about longlens that can only be known on a GPU, in steps of at most eight minutes.

    python benchmarks/gpu.py --list                 the steps
    python benchmarks/gpu.py                        all steps, the most valuable first, each in a process of its own
    python benchmarks/gpu.py --step 3 --out DIR     one step; steps may be given several times
    python benchmarks/gpu.py --minutes 25           no step is begun that would not end by then
    python benchmarks/gpu.py --at-most 1.5          each step ends after so many minutes; what it did not reach is told
    python benchmarks/gpu.py --dry-run              every step at tiny sizes on the CPU, in well under a minute

Every measurement is a line in gpu_<device>_<date>.jsonl as soon as it is taken; the .json beside it and a short table
come last. A measurement that fails is recorded with its error and stops nothing; a step that hangs is ended at its
deadline. Needs torch and longlens' own dependencies for attention: no pyarrow, biopython, transformers or click.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_steps import correctness, facts, memory, models, speed
from gpu_steps.setup import Setup
from harness import RESULTS, Row, append_line, hardware, read_lines, write_json


class Step(NamedTuple):
    """A step: minutes at most, what it finds out, and its function."""

    name: str
    minutes: float
    about: str
    run: Callable[[Setup], None]


STEPS = (
    Step("facts", 2, "versions, clocks, bandwidth, products, launches, which kernels exist", facts.run),
    Step("correctness", 6, "every method and mask, forward and gradients, against float64", correctness.run),
    Step("speed", 8, "exact attention beside PyTorch's kernels, FlexAttention, flash-attention", speed.run),
    Step("packed", 4, "packed sequences beside loops, padding, varlen_attn, flash-attention", speed.run_packed),
    Step("lens", 4, "the scan with the standard set beside attention", models.run_lens),
    Step("embedding", 6, "packed ESM-2 35M, 150M, 650M: tokens a second, watched, kernels", models.run_embedding),
    Step("contacts", 3, "contact maps beside the model alone; memory", models.run_contacts),
    Step("memory", 4, "peak memory at N and 2N of every method", memory.run),
    Step("methods", 5, "every method beside PyTorch's fused attention", speed.run_methods),
    Step("conformance", 8, "the conformance suite of every method", correctness.run_suite),
)


def run_here(numbers: Sequence[int], device: str, dry: bool, log: Path, at_most: float) -> None:
    """Run steps in this process, each of them for `at_most` minutes."""
    for number in numbers:
        step = bounded(STEPS[number - 1], at_most)
        begun = time.monotonic()
        setup = Setup(step.name, device, dry, begun + 60 * step.minutes, log)
        print(f"-- {number} {step.name}: {step.about}", flush=True)
        try:
            with warnings.catch_warnings():
                # FlexAttention says so where it runs uncompiled, and the profiler where it has no device
                warnings.simplefilter("ignore")
                step.run(setup)
        except Exception as error:
            setup.fail("the step", error)
        setup.record("step", minutes=(time.monotonic() - begun) / 60, measurements=len(setup.rows))


def bounded(step: Step, at_most: float) -> Step:
    """The step with no more than so many minutes."""
    return step._replace(minutes=min(step.minutes, at_most))


def run_apart(numbers: Sequence[int], dry: bool, log: Path, deadline: float, at_most: float = math.inf) -> None:
    """Run each step in a process of its own, so that neither a crash nor a hang stops the others."""
    for number in numbers:
        step = bounded(STEPS[number - 1], at_most)
        if time.monotonic() + 60 * step.minutes > deadline:
            append_line(log, {"step": step.name, "name": "the step", "not_run": "no time was left for it"})
            continue
        call = [sys.executable, str(Path(__file__).resolve()), "--child", "--step", str(number), "--log", str(log)]
        call += ["--at-most", str(at_most)]
        child = subprocess.Popen([*call, *(["--dry-run"] if dry else [])])
        try:
            # a measurement that is under way at the deadline may end
            status = child.wait(timeout=60 * step.minutes + 45)
            reason = f"the process ended with {status}" if status else ""
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            reason = f"ended after {step.minutes:.0f} minutes and 45 seconds"
        if reason:
            append_line(log, {"step": step.name, "name": "the step", "error": reason})


def summary(rows: Sequence[Row]) -> str:
    """A line for each step, and what went wrong."""
    lines = [f"{'step':<12} {'measured':>8} {'not ok':>7} {'errors':>7} {'absent':>7}"]
    for step in STEPS:
        mine = [row for row in rows if row["step"] == step.name and row["name"] != "step"]
        if mine:
            wrong = sum(row.get("ok") is False for row in mine)
            counts = [sum(key in row for row in mine) for key in ("error", "not_run")]
            lines.append(f"{step.name:<12} {len(mine) - sum(counts):>8} {wrong:>7} {counts[0]:>7} {counts[1]:>7}")
    for row in rows:
        if "error" in row or row.get("ok") is False:
            lines.append(f"{row['step']}: {row['name']}: {row.get('error', 'not ok')}")
    for row in rows:
        if "ratio" in row and row["name"].endswith((": longlens", ": standard set", ": with contacts")):
            lines.append(f"{row['name']}: {row['ratio']:.2f} times as long ({row['median_s'] * 1e3:.3g} ms)")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the steps")
    parser.add_argument("--step", type=int, action="append", choices=range(1, len(STEPS) + 1), help="run this one")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all steps together")
    parser.add_argument("--at-most", type=float, default=math.inf, help="minutes for each step")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS), help="folder of the results"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    chosen = parse(argv)
    if chosen.list:
        for number, step in enumerate(STEPS, 1):
            print(f"{number:>2} {step.name:<12} {step.minutes:>2.0f} min  {step.about}")
        return 0
    device = "cpu" if chosen.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("expected a GPU that torch can use, found none; --dry-run tries every step on the CPU", file=sys.stderr)
        return 2
    numbers = chosen.step or list(range(1, len(STEPS) + 1))
    if chosen.child:
        run_here(numbers, device, chosen.dry_run, chosen.log, chosen.at_most)
        return 0
    theme = "gpu-dry" if chosen.dry_run else "gpu"
    log = chosen.out / f"{theme}_{hardware(device)}_{time.strftime('%Y-%m-%d')}.jsonl"
    before = len(read_lines(log))
    if chosen.dry_run:
        # one process: starting ten of them would be most of the time
        run_here(numbers, device, True, log, chosen.at_most)
    else:
        run_apart(numbers, False, log, time.monotonic() + 60 * chosen.minutes, chosen.at_most)
    rows = read_lines(log)
    write_json(log.with_suffix(".json"), rows)
    print(summary(rows[before:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
