"""`benchmarks/gpu.py` at tiny sizes on the CPU, so that it works the first time that somebody has a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
# what a machine with a GPU may lack, and what the steps must not need
ABSENT = ("pyarrow", "Bio", "click", "rich", "transformers", "matplotlib", "h5py", "safetensors", "psutil")
ALLOWED = {"hf", "watching", "ops", "lens", "models", "testing", "io", "report", "shapes", "errors"}
PROGRAM = """
import runpy, sys
for name in {absent!r}:
    sys.modules[name] = None
sys.argv = ["gpu.py", "--dry-run", "--out", {out!r}]
try:
    runpy.run_path({gpu!r}, run_name="__main__")
except SystemExit as stop:
    print("STATUS", stop.code)
print("PARTS", *sorted({{name.split(".")[1] for name in sys.modules if name.startswith("longlens.")}}))
"""


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """The rows of a dry run, and what it printed."""
    out = tmp_path_factory.mktemp("gpu")
    program = PROGRAM.format(absent=ABSENT, out=str(out), gpu=str(GPU))
    # as the program itself is started: its own folder first on the path
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(GPU.parent)!r})\n{program}"],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert "STATUS 0" in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]
    (lines,) = out.glob("gpu-dry_*.jsonl")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert json.loads(lines.with_suffix(".json").read_text()) == rows
    return rows, run.stdout


def test_every_step_measures_without_an_error(dry: tuple[list[dict[str, Any]], str]) -> None:
    rows, said = dry
    assert [row for row in rows if "error" in row or row.get("ok") is False] == []
    import gpu

    steps = [step.name for step in gpu.STEPS]
    assert len(steps) == 10
    measured = {row["step"] for row in rows if row["name"] != "step" and "not_run" not in row}
    assert measured == set(steps)
    for step in steps:
        assert f"\n{step} " in said


def test_what_is_absent_on_a_cpu_is_told_as_such(dry: tuple[list[dict[str, Any]], str]) -> None:
    absent = {row["name"].rsplit(": ", 1)[-1] for row in dry[0] if "not_run" in row}
    assert absent >= {"flash-attn", "SDPA cuDNN"}
    assert absent <= {"flash-attn", "SDPA cuDNN", "SDPA efficient", "varlen_attn", "flash-attn, packed", "clocks"}


def test_only_the_parts_that_need_little_are_imported(dry: tuple[list[dict[str, Any]], str]) -> None:
    parts = dry[1].splitlines()[-1].split()
    assert parts[0] == "PARTS"
    assert set(parts[1:]) <= ALLOWED


def test_without_a_gpu_and_without_dry_run_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert gpu.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(gpu.STEPS)


def test_steps_run_apart_and_one_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    log = tmp_path / "log.jsonl"
    gpu.run_apart([10], True, log, time.monotonic() + 3600)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["name"] for row in rows} >= {"exact", "step"}
    assert all(row["step"] == "conformance" and "error" not in row for row in rows)
    # a second for the child: it is still importing torch then
    monkeypatch.setattr(gpu, "STEPS", (gpu.STEPS[0]._replace(minutes=-44 / 60), *gpu.STEPS[1:]))
    gpu.run_apart([1, 2], True, log, time.monotonic() + 10)
    hung, late = (json.loads(line) for line in log.read_text().splitlines()[len(rows) :])
    assert hung["step"] == "facts"
    assert hung["error"].startswith("ended after")
    assert late == {"step": "correctness", "name": "the step", "not_run": "no time was left for it"}
    assert "facts: the step: ended after" in gpu.summary([*rows, hung, late])


def test_a_measurement_that_fails_stops_nothing(tmp_path: Path) -> None:
    from gpu_steps.setup import Setup

    def fails() -> dict[str, Any]:
        raise RuntimeError("out of\nmemory")

    setup = Setup("facts", "cpu", True, time.monotonic() + 60, tmp_path / "log.jsonl")
    setup.measure("one", fails)
    setup.measure("two", fails, optional=True)
    setup.measure("three", lambda: {"value": 1.23456789, "ok": True})
    setup.compare("four", {"SDPA": lambda: lambda: None, "broken": lambda: fails, "absent": fails}, base="SDPA",
                  optional=("absent",))  # fmt: skip
    setup.deadline = time.monotonic() - 1
    setup.measure("five", fails)
    rows = {row["name"]: row for row in (json.loads(line) for line in setup.log.read_text().splitlines())}
    assert rows["one"]["error"] == rows["two"]["not_run"] == "RuntimeError: out of memory"
    assert (rows["three"]["value"], rows["three"]["ok"]) == (1.2346, True)
    assert rows["four: broken"]["error"] == rows["four: absent"]["not_run"]
    assert rows["four: SDPA"]["ratio"] == 1.0
    assert rows["five"]["not_run"] == "time was up"
