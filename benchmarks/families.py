"""The families of attention trained alike: the same model, data, seed and steps, another method.

    python benchmarks/families.py UNIPROT.fasta.gz HELD_OUT.fasta.gz [--steps 300] [--only window]

Crops are cut from proteins laid end to end, 1,024 and 8,192 tokens long, 8,192 tokens to a step. Each run is a process
of its own; a run that was cut off goes on. Speed is then measured in short runs on the same crops, all methods in turn,
round after round, in an order that rotates: give them the machine to themselves.
Writes benchmarks/results/families_<date>.json, the table in docs/families.md and docs/images/families.{svg,png}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl

from harness import DOCS, facts, fill, machine_line, order_of, ratio, run_measured, show_ratio, table, today, write_json

mpl.use("Agg")
from matplotlib import pyplot as plt

METHODS = ("exact", "window:128", "bigbird:64", "linear", "performer:128", "nystrom:64", "scatterbrain:64,features=128")
CROPS = (1024, 8192)
SHAPE = {"--layers": 4, "--width": 128, "--heads": 4}
TOKENS = 8192
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=60)
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", type=Path, default=Path("runs/families"), help="folder of the runs")
    chosen = parser.parse_args()
    target, data = today("families")
    data.setdefault("machine", facts())
    data["task"] = {**SHAPE, "tokens": TOKENS, "steps": chosen.steps, "joined": True, "dtype": "bfloat16", "seed": 0}
    for crop in CROPS:
        for method in METHODS:
            known = {(row["method"], row["crop"], row["steps"]) for row in data["rows"]}
            if chosen.only not in method or (method, crop, chosen.steps) in known:
                continue
            row = train(method, crop, chosen)
            data["rows"] = [old for old in data["rows"] if (old["method"], old["crop"]) != (method, crop)] + [row]
            write_json(target, data)
            print(json.dumps({name: value for name, value in row.items() if name != "curve"}), flush=True)
    for crop in CROPS:
        rows = [row for row in data["rows"] if row["crop"] == crop and "perplexity" in row]
        if all("rates" in row for row in rows):
            continue
        for row in rows:
            row["rates"] = []
        for turn in range(ROUNDS):
            for method in order_of([row["method"] for row in rows], turn):
                row = next(row for row in rows if row["method"] == method)
                row["rates"].append(speed(method, crop, chosen))
                print(method, crop, row["rates"], flush=True)
        # only whole rounds are kept: a ratio wants both of its sides in each
        write_json(target, data)
    fill(DOCS / "families.md", "families.py", page_text(data))
    draw(data)


def train(method: str, crop: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """One run; its figures from the log and from the process."""
    folder = chosen.runs / f"{method.replace(':', '-').replace(',', '-')}_{crop}"
    call = command(method, crop, chosen, chosen.steps, chosen.every, chosen.held_out, folder)
    done = run_measured(call)
    if done.status:
        return {"method": method, "crop": crop, "steps": chosen.steps, "not_run": f"exit {done.status}"}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "method": method, "crop": crop, "steps": chosen.steps, "perplexity": log[-1]["held_out"],
        "peak_mib": done.peak / 2**20, "curve": [[line["step"], line["held_out"]] for line in log],
    }  # fmt: skip


def speed(method: str, crop: int, chosen: argparse.Namespace) -> float:
    """Residues per second of some steps after the first ones; with little held out, which is not part of it."""
    with tempfile.TemporaryDirectory() as place:
        folder, few = Path(place) / "run", Path(place) / "few.fasta"
        few.write_text(">few\n" + "MKTAYIAKQR" * 100 + "\n")
        subprocess.run(command(method, crop, chosen, 10, 5, few, folder), check=True, stdout=subprocess.DEVNULL)
        return float(json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["rate"])


def command(
    method: str, crop: int, chosen: argparse.Namespace, steps: int, every: int, held_out: Path, folder: Path
) -> list[str]:
    """`longlens train` with the benchmark's settings."""
    options = {**SHAPE, "--steps": steps, "--tokens": TOKENS, "--crop": crop, "--every": every, "--method": method,
               "--held-out": held_out, "-o": folder}  # fmt: skip
    call = [sys.executable, "-m", "longlens", "train", chosen.fasta, "--joined",
            *(part for option in options.items() for part in option)]  # fmt: skip
    return [str(part) for part in call]


def page_text(data: dict[str, Any]) -> str:
    """The table, as docs/families.md has it."""
    rows = {(row["method"], row["crop"]): row for row in data["rows"] if "perplexity" in row}
    lines = []
    for method in METHODS:
        cells = []
        for crop in CROPS:
            row, exact = rows.get((method, crop)), rows.get(("exact", crop))
            if row is None:
                cells += ["", "", "", ""]
                continue
            faster = ""
            if exact is not None and "rates" in row and "rates" in exact:
                # rates are the other way round than seconds
                faster = show_ratio(ratio(row["rates"], exact["rates"]))
            rate = f"{statistics.median(row['rates']):,.0f}" if "rates" in row else ""
            cells += [f"{row['perplexity']:.2f}", rate, faster, f"{row['peak_mib']:,.0f}"]
        lines.append([f"`{method}`", *cells])
    head = ["method"]
    for crop in CROPS:
        head += [f"perplexity, {crop:,}", "residues/s", "of exact attention's", "peak MiB"]
    task = data["task"]
    return (
        f"{machine_line(data['machine'])}. {task['--layers']} layers, width {task['--width']}, {task['--heads']} "
        f"heads, bfloat16, {task['tokens']:,} tokens a step, {task['steps']} steps. Speed is the median of "
        f"{ROUNDS} rounds, relative to exact attention's in the same round.\n\n{table(head, lines)}"
    )


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
        figure.savefig(DOCS / "images" / f"families.{kind}", dpi=150)


if __name__ == "__main__":
    main()
