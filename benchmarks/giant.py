"""A protein of 34,350 residues, titin's length, through the 150M architecture in float32: time and peak memory.

    python benchmarks/giant.py PROTEINS.fasta.gz        about twelve minutes on two cores

Real proteins joined, random weights, `longlens embed` with vectors and surprise, as a process of its own. Writes
benchmarks/results/giant_<date>.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from checkpoints import make_model
from harness import GIB, facts, run_measured, today, write_json
from proteins import joined

GIANT = 34_350


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = make_model("150M", folder)
        (folder / "giant.fasta").write_text(f">giant\n{joined(Path(sys.argv[1]), GIANT)}\n")
        done = run_measured([
            sys.executable, "-m", "longlens", "embed", str(folder / "giant.fasta"), "-o", str(folder / "out"),
            "--model", str(model), "--dtype", "float32", "--include", "mean", "surprise",
        ])  # fmt: skip
    if done.status:
        raise SystemExit(f"failed: {done.status}")
    measured = {"seconds": done.seconds, "peak_gib": done.peak / GIB}
    data = {"machine": facts(), "residues": GIANT, "model": "150M", "dtype": "float32", **measured}
    write_json(today("giant")[0], data)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
