"""Write the table of docs/benchmarks.md that shows what `benchmarks/gpu.py` measured on a GPU.

    python benchmarks/gpu_page.py

Takes the newest results file of a GPU, all of which one commit measured: that with the latest date among its records of
the machine, and of several the one that was written to last.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness import DOCS, RESULTS, fill, read_lines, show_ratio, show_seconds, table

# contender -> what stands in the column "beside"
SHOWN = {
    "longlens": "PyTorch's fused attention",
    "longlens, log-sum-exp": "PyTorch's fused attention",
    "varlen_attn": "PyTorch's fused attention, one by one",
    "standard set": "PyTorch's fused attention",
    "with the standard set": "the model alone",
    "with contacts": "the model alone",
    "one by one": "packed",
}
STEPS = ("speed", "packed", "lens", "embedding", "contacts")


def newest_file(files: Sequence[Path]) -> Path:
    """The file with the latest recorded date, and of several the one that was written to last."""

    def age(path: Path) -> tuple[str, float]:
        dates = [str(row["date"]) for row in read_lines(path) if row["name"] == "machine"]
        return max(dates, default=""), path.stat().st_mtime

    return max(files, key=age)


def main() -> int:
    files = sorted(RESULTS.glob("gpu_*.jsonl"))
    if not files:
        print(f"expected results of benchmarks/gpu.py in {RESULTS}, found none", file=sys.stderr)
        return 2
    rows = read_lines(newest_file(files))
    machine = next(row for row in rows if row["name"] == "machine")
    newest = {row["name"]: row for row in rows if row["step"] in STEPS and "ratio" in row}
    lines = []
    for name, row in newest.items():
        what, _, contender = name.rpartition(": ")
        # other widths differ little
        if contender in SHOWN and (row["step"] != "speed" or "D=64" in what):
            beside = SHOWN[contender] if row["step"] != "packed" else "PyTorch's fused attention, one by one"
            lines.append((f"{what}: {contender}", show_seconds(row["median_s"]), show_ratio(row), beside))
    versions = machine["packages"]
    text = (
        f"One {machine['gpu']}, PyTorch {versions['torch']}, {machine['date']}. The ratio is the time beside the named "
        "peer's on the same inputs, interleaved in one run, with its range; below 1 is faster.\n\n"
        f"{table(('measurement', 'time', 'ratio', 'beside'), lines)}"
    )
    fill(DOCS / "benchmarks.md", "gpu_page.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
