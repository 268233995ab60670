"""The families of attention trained alike: the same model, data, seed and steps, another method.

    python benchmarks/families.py UNIPROT.fasta.gz HELD_OUT.fasta.gz [--steps 300] [--only window]

Crops are cut from proteins laid end to end, 1,024 and 8,192 tokens long, 8,192 tokens to a step. Each run is a process
of its own; a run that was cut off goes on. Speed is then measured in short runs: give them the machine to themselves.
Writes benchmarks/results/families_<date>.json, the table in docs/families.md and docs/images/families.{svg,png}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib as mpl

import measure

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
METHODS = ("exact", "window:128", "bigbird:64", "linear", "performer:128", "nystrom:64", "scatterbrain:64,features=128")
CROPS = (1024, 8192)
SHAPE = {"--layers": 4, "--width": 128, "--heads": 4}
TOKENS = 8192
START, END = "<!-- made by benchmarks/families.py -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=60)
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", type=Path, default=Path("runs/families"), help="folder of the runs")
    given = parser.parse_args()
    target = HERE / "results" / f"families_{date.today()}.json"
    data = json.loads(target.read_text()) if target.exists() else {"machine": measure.facts("cpu"), "rows": []}
    data["task"] = {**SHAPE, "tokens": TOKENS, "steps": given.steps, "joined": True, "dtype": "bfloat16", "seed": 0}
    for crop in CROPS:
        for method in METHODS:
            known = {(row["method"], row["crop"], row["steps"]) for row in data["rows"]}
            if given.only not in method or (method, crop, given.steps) in known:
                continue
            row = train(method, crop, given)
            data["rows"] = [old for old in data["rows"] if (old["method"], old["crop"]) != (method, crop)] + [row]
            target.write_text(json.dumps(data, indent=1) + "\n")
            print(json.dumps({name: value for name, value in row.items() if name != "curve"}), flush=True)
    for row in data["rows"]:
        if "residues_per_second" not in row and "perplexity" in row:
            row["residues_per_second"] = speed(row["method"], row["crop"], given)
            target.write_text(json.dumps(data, indent=1) + "\n")
            print(row["method"], row["crop"], row["residues_per_second"], flush=True)
    write_page(data)
    draw(data)


def train(method: str, crop: int, given: argparse.Namespace) -> dict[str, Any]:
    """One run; its figures from the log and from the process."""
    folder = given.runs / f"{method.replace(':', '-').replace(',', '-')}_{crop}"
    call = command(method, crop, given, given.steps, given.every, given.held_out, folder)
    child = subprocess.Popen(call, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        return {"method": method, "crop": crop, "steps": given.steps, "not_run": f"exit {status}"}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "method": method, "crop": crop, "steps": given.steps, "perplexity": log[-1]["held_out"],
        "peak_mib": usage.ru_maxrss / 1024, "curve": [[line["step"], line["held_out"]] for line in log],
    }  # fmt: skip


def speed(method: str, crop: int, given: argparse.Namespace) -> float:
    """Residues per second of some steps after the first ones; with little held out, which is not part of it."""
    with tempfile.TemporaryDirectory() as place:
        folder, few = Path(place) / "run", Path(place) / "few.fasta"
        few.write_text(">few\n" + "MKTAYIAKQR" * 100 + "\n")
        subprocess.run(command(method, crop, given, 10, 5, few, folder), check=True, stdout=subprocess.DEVNULL)
        return float(json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["rate"])


def command(
    method: str, crop: int, given: argparse.Namespace, steps: int, every: int, held_out: Path, folder: Path
) -> list[str]:
    """`longlens train` with the benchmark's settings."""
    options = {**SHAPE, "--steps": steps, "--tokens": TOKENS, "--crop": crop, "--every": every, "--method": method,
               "--held-out": held_out, "-o": folder}  # fmt: skip
    call = [sys.executable, "-m", "longlens", "train", given.fasta, "--joined",
            *(part for option in options.items() for part in option)]  # fmt: skip
    return [str(part) for part in call]


def write_page(data: dict[str, Any]) -> None:
    """The table in docs/families.md, between its marks."""
    page = HERE.parent / "docs" / "families.md"
    text = page.read_text()
    rows = {(row["method"], row["crop"]): row for row in data["rows"] if "perplexity" in row}
    lines = [
        "| method | " + " | ".join(f"perplexity, {crop:,} | residues/s | peak MiB" for crop in CROPS) + " |",
        "|---|" + "---:|" * 3 * len(CROPS),
    ]
    for method in METHODS:
        cells = []
        for crop in CROPS:
            row = rows.get((method, crop))
            cells += (
                [f"{row['perplexity']:.2f}", f"{row['residues_per_second']:,.0f}", f"{row['peak_mib']:,.0f}"]
                if row else ["", "", ""]
            )  # fmt: skip
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    machine, task = data["machine"], data["task"]
    said = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}. {task['--layers']} layers, "
        f"width {task['--width']}, {task['--heads']} heads, bfloat16, {task['tokens']:,} tokens a step, "
        f"{task['steps']} steps."
    )
    before, rest = text.split(START, 1)
    page.write_text(before + START + "\n\n" + said + "\n\n" + "\n".join(lines) + "\n\n" + END + rest.split(END, 1)[1])


def draw(data: dict[str, Any]) -> None:
    """Held-out perplexity against steps, a panel for each crop length."""
    figure, panels = plt.subplots(1, len(CROPS), figsize=(11, 3.6), sharey=True, layout="constrained")
    for panel, crop in zip(panels, CROPS, strict=True):
        for method in METHODS:
            curves = [
                row["curve"]
                for row in data["rows"]
                if (row["method"], row["crop"]) == (method, crop) and "curve" in row
            ]
            if curves:
                panel.plot(*zip(*curves[0], strict=True), label=method, lw=1.5)
        panel.set_title(f"crops of {crop:,} tokens", fontsize=10)
        panel.set_xlabel("step")
    panels[0].set_ylabel("held-out perplexity")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    for kind in ("svg", "png"):
        figure.savefig(HERE.parent / "docs" / "images" / f"families.{kind}", dpi=150)


if __name__ == "__main__":
    main()
