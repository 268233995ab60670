"""Plots of time and peak memory against length, both axes logarithmic: one picture for each family.

    python benchmarks/plots.py [RESULTS.json]      docs/images/benchmarks-{exact,sparse,approximate}.{svg,png}

Solid lines are longlens, dashed lines the peers. Where the number of heads changes along the axis, time is given per
head.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from contenders import BY_NAME, CONTENDERS
from harness import DOCS, newest

IMAGES = DOCS / "images"
TITLES = {
    "exact": "Exact attention",
    "sparse": "Sparse attention: exact softmax over fewer pairs",
    "approximate": "Softmax approximators",
}
# colours that stay apart for most eyes (Okabe and Ito 2008, with greys between)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b", "#7f7f7f", "#b5bd00")
MARKS = "osD^vPX*<>"


def series(rows: list[dict[str, Any]], contender: str, dtype: str, which: str, value: str) -> list[tuple[int, float]]:
    """Points (length, value); time in milliseconds for each head, memory in MiB."""
    points = []
    for row in rows:
        if (row["contender"], row["dtype"], row["pass"]) != (contender, dtype, which) or value not in row:
            continue
        scaled = row[value] * 1000 / row["heads"] if value == "median_s" else max(row[value], 2**16) / 2**20
        points.append((row["length"], scaled))
    return sorted(points)


def draw(data: dict[str, Any], theme: str, dtypes: list[str]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [line.name for line in CONTENDERS if line.theme == theme]
    kinds = (("time", "median_s", "time for each head, ms"), ("memory", "growth_bytes", "peak growth at one head, MiB"))
    figure, axes = plt.subplots(len(dtypes), 2, figsize=(13, 4.2 * len(dtypes)), squeeze=False, layout="constrained")
    lengths = sorted({row["length"] for row in data["time"]})
    for down, dtype in enumerate(dtypes):
        for across, (table, value, label) in enumerate(kinds):
            axis = axes[down][across]
            counts = {True: 0, False: 0}
            for name in names:
                ours = BY_NAME[name].ours
                place = counts[ours]
                counts[ours] += 1
                points = series(data[table], name, dtype, "forward", value)
                if not points:
                    continue
                axis.plot(
                    *zip(*points, strict=True), "-" if ours else "--", color=COLOURS[place % len(COLOURS)],
                    marker=MARKS[place % len(MARKS)], markersize=5, markerfacecolor=None if ours else "white",
                    linewidth=1.8 if ours else 1.3, label=name,
                )  # fmt: skip
            axis.set(
                xscale="log", yscale="log", xlabel="length N, tokens", ylabel=label, title=f"{dtype}, forward: {table}"
            )
            axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            axis.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
            axis.minorticks_off()
            axis.grid(visible=True, color="#dddddd", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    seen: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        seen |= dict(zip(labels, handles, strict=True))
    ordered = [name for name in names if name in seen]
    figure.legend(
        [seen[name] for name in ordered], ordered, loc="outside right center",
        fontsize=9, frameon=False, handlelength=3.2,
    )  # fmt: skip
    machine = data["machine"]
    figure.suptitle(
        f"{TITLES[theme]}  (B=1, D=64; {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['packages']['torch']}, {machine['date']})",
        fontsize=11,
    )
    return figure


def main(argv: list[str] | None = None) -> None:
    path = Path(argv[0]) if argv else newest("attention_*")
    if path is None:
        print("plots: no results yet; `python benchmarks/run.py` makes them")
        return
    data = json.loads(path.read_text())
    IMAGES.mkdir(parents=True, exist_ok=True)
    dtypes = sorted({row["dtype"] for row in data["time"]}, reverse=True)
    for theme in TITLES:
        figure = draw(data, theme, dtypes)
        for kind in ("svg", "png"):
            # a fixed salt and no date, so that the same figures give the same file
            import matplotlib

            matplotlib.rcParams["svg.hashsalt"] = "longlens"
            figure.savefig(
                IMAGES / f"benchmarks-{theme}.{kind}", dpi=110, metadata={"Date": None} if kind == "svg" else None
            )
        print(f"plots: docs/images/benchmarks-{theme}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
