"""`benchmarks/gpu.py` at tiny sizes on the CPU, so that it works the first time that somebody has a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
# what a machine with a GPU may lack, and what the steps must not need
ABSENT = ("pyarrow", "Bio", "click", "rich", "transformers", "matplotlib", "h5py", "safetensors", "psutil")
ALLOWED = {"ops", "lens", "models", "testing", "io", "report", "shapes", "errors"}
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
    listed = subprocess.run([sys.executable, str(GPU), "--list"], capture_output=True, text=True, check=True).stdout
    steps = [line.split()[1] for line in listed.splitlines()]
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


def test_without_a_gpu_and_without_dry_run_it_says_so() -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.cuda.is_available = lambda: False\n"
         f"import runpy, sys; sys.argv = ['gpu.py']; sys.path.insert(0, {str(GPU.parent)!r})\n"
         f"runpy.run_path({str(GPU)!r}, run_name='__main__')"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "--dry-run" in run.stderr
