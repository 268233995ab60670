"""The main job on real proteins: embed them, draw the surprise along the longest, and print the memory that it took.

python examples/demo.py [OUTPUT]
"""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import matplotlib as mpl
import numpy as np

import longlens
from longlens.cli.main import cli
from longlens.jobs.plan import peak_memory, standard_bytes
from longlens.ops.explain import format_bytes

HERE = Path(__file__).parent
# residues to a point of the line
SMOOTH = 50


def main() -> None:
    """Run `longlens embed`, draw the figure, and print the peak memory."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    again = (output / "manifest.json").is_file()
    proteins = HERE / "proteins.fasta.gz"
    command = [
        "embed",
        os.path.relpath(proteins),
        "-o",
        str(output),
        "--model",
        "tiny",
        "--include",
        "mean",
        "surprise",
    ]
    print(f"running     longlens {' '.join(command)}", flush=True)
    cli.main(command, standalone_mode=False)
    results = longlens.open_results(output)
    row = max(results.table, key=lambda row: row["length"])
    figure = draw(results, row, output / "surprise.png")
    config = longlens.load("tiny").config
    needed = standard_bytes(config, row["length"] + 2, 4)
    print(f"figure      {figure}")
    if again:
        print(f"These results were computed earlier; remove the folder {output} to compute them again.")
    else:
        print(f"peak memory {format_bytes(peak_memory())} for the whole process, including PyTorch")
    print(
        f"in contrast {format_bytes(needed)} for the N x N attention weights of one layer for the longest protein, "
        f"{format_bytes(config.layers * needed)} for all {config.layers} layers"
    )


def draw(results: longlens.Results, row: dict[str, object], path: Path) -> Path:
    """Surprise along a protein, beside the entropy of the prediction, which is the surprise that the model expects."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    surprise, entropy = (results.residues(name, row) for name in ("surprise", "entropy"))
    figure, axes = plt.subplots(figsize=(10, 3.2), layout="constrained")
    places = np.arange(1, len(surprise) + 1)
    axes.plot(places, surprise, ",", color="0.75", zorder=0)
    kernel = np.ones(SMOOTH) / SMOOTH
    middle = slice(SMOOTH // 2, len(places) - SMOOTH + SMOOTH // 2 + 1)
    axes.plot(
        places[middle],
        np.convolve(surprise, kernel, "valid"),
        color="tab:red",
        lw=1,
        label="surprise (the model sees the residue)",
    )
    axes.plot(
        places[middle],
        np.convolve(entropy, kernel, "valid"),
        color="tab:blue",
        lw=1,
        label="expected (entropy)",
    )
    # room above for the legend
    axes.set(
        xlabel="residue", ylabel="nats", xlim=(1, len(surprise)), ylim=(0, 1.25 * max(surprise.max(), entropy.max()))
    )
    title = f"{row['id']}  {row['description']}"
    axes.set_title(textwrap.shorten(title, 110), fontsize=9, loc="left")
    axes.legend(title=f"mean over {SMOOTH} residues; model tiny, N = {len(surprise):,}", fontsize=8, title_fontsize=8,
                ncols=2, loc="upper right")  # fmt: skip
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
