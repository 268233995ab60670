"""A protein of 34,350 residues, titin's length, through the 150M architecture in float32: time and peak memory.

    python benchmarks/giant.py UNIPROT.fasta.gz        about twelve minutes on two cores

Real proteins joined, random weights, `longlens embed` with vectors and surprise, as a process of its own. Writes
benchmarks/results/giant_<date>.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import measure
from contacts import GIANT, HERE, joined, make_model


def main() -> None:
    fasta = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = make_model("150M", folder)
        (folder / "giant.fasta").write_text(f">giant\n{joined(fasta, GIANT)}\n")
        call = [sys.executable, "-m", "longlens", "embed", str(folder / "giant.fasta"), "-o", str(folder / "out"),
                "--model", str(model), "--dtype", "float32", "--include", "mean", "surprise"]  # fmt: skip
        begun = time.perf_counter()
        process = subprocess.Popen(call)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {status}")
    found = {"seconds": time.perf_counter() - begun, "peak_gib": usage.ru_maxrss / 2**20}
    data = {"machine": measure.facts("cpu"), "residues": GIANT, "model": "150M", "dtype": "float32", **found}
    (HERE / "results" / f"giant_{date.today()}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
