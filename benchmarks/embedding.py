"""Residues per second and peak memory of embedding proteins: longlens, transformers, fair-esm, esm-cpp side by side.

    python benchmarks/embedding.py UNIPROT.fasta.gz [--seconds 60] [--only longlens] [--models 35M] [--sets first]

The same random-weight ESM-2 for all. Contenders run one after the other, each in a process of its own, on the first
2,000 proteins and on the 100 longest, until done or until the clock stops them. Run it alone on the machine. esm-cpp
needs an older NumPy: name a Python that has it with --esm-cpp-python. Results go to
benchmarks/results/embedding_<date>.json, a row as soon as it is measured; a second run goes on. The table in
docs/proteins.md is made from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import measure
from longlens.io.alphabet import ESM
from longlens.io.survey import read_cleaned
from longlens.jobs.plan import operations
from longlens.models.encoder import EncoderConfig
from longlens.models.language_model import MaskedLM
from longlens.models.pretrained import save

HERE = Path(__file__).resolve().parent
SHAPES = {"35M": (12, 480, 20), "150M": (30, 640, 20)}
START, END = "<!-- made by benchmarks/embedding.py -->", "<!-- end -->"
SETS = {"first": "the first 2,000 proteins", "longest": "the 100 longest"}
OURS = "longlens, packed, bfloat16"
# name, contender, dtype, proteins to a batch (0: by tokens), tokens to a batch, sorted
CONTENDERS: list[tuple[str, str, str, int, int, bool]] = [
    (OURS, "longlens", "bfloat16", 0, 16_384, False),
    ("longlens, packed, float32", "longlens", "float32", 0, 16_384, False),
    ("transformers, one by one, bfloat16", "transformers", "bfloat16", 1, 0, False),
    ("transformers, one by one, float32", "transformers", "float32", 1, 0, False),
    ("transformers, 8 padded, bfloat16", "transformers", "bfloat16", 8, 0, False),
    ("transformers, 8 padded, float32", "transformers", "float32", 8, 0, False),
    ("transformers, 8 padded, sorted, bfloat16", "transformers", "bfloat16", 8, 0, True),
    ("transformers, 8 padded, sorted, float32", "transformers", "float32", 8, 0, True),
    ("fair-esm, 4,096 tokens padded, float32", "fair-esm", "float32", 0, 4096, True),
    ("fair-esm, one by one, float32", "fair-esm", "float32", 1, 0, False),
    ("esm-cpp, packed, float32", "esm-cpp", "float32", 0, 4096, False),
    ("esm-cpp, packed, int8", "esm-cpp", "int8", 0, 4096, False),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", default="", help="contenders whose name holds this")
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--sets", nargs="*", default=["first", "longest"])
    parser.add_argument("--esm-cpp-python", default=None)
    given = parser.parse_args()
    proteins = list(read_cleaned([given.fasta]))
    sets = {"first": proteins[:2000], "longest": sorted(proteins, key=len)[-100:]}
    target = HERE / "results" / f"embedding_{date.today()}.json"
    data = json.loads(target.read_text()) if target.exists() else {"machine": measure.facts("cpu"), "rows": []}
    done = {(row["model"], row["set"], row["name"]) for row in data["rows"] if "residues_per_second" in row}
    with tempfile.TemporaryDirectory() as folder:
        for model in given.models:
            config = write_model(model, Path(folder) / model)
            for name_of_set in given.sets:
                for contender in CONTENDERS:
                    key = (model, name_of_set, contender[0])
                    if given.only not in contender[0] or key in done:
                        continue
                    row = run(contender, model, Path(folder) / model, sets[name_of_set], given)
                    row = dict(zip(("model", "set", "name"), key, strict=True)) | row
                    if "residues_per_second" in row:
                        lengths = [len(text) for text in sets[name_of_set]]
                        row["gflops"] = row["residues_per_second"] * operations(config, lengths) / sum(lengths) / 1e9
                        row["product_gflops"] = product_rate(config, contender[2])
                    data["rows"] = [old for old in data["rows"] if (old["model"], old["set"], old["name"]) != key]
                    data["rows"].append(row)
                    target.write_text(json.dumps(data, indent=1) + "\n")
                    print(json.dumps(row), flush=True)
    write_page(data)


def write_page(data: dict[str, Any]) -> None:
    """The tables in docs/proteins.md, between their marks."""
    page = HERE.parent / "docs" / "proteins.md"
    before, rest = page.read_text().split(START, 1)
    machine = data["machine"]
    parts = [f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}."]
    for model, chosen in dict.fromkeys((row["model"], row["set"]) for row in data["rows"]):
        rows = [row for row in data["rows"] if (row["model"], row["set"]) == (model, chosen)]
        rates = [row["residues_per_second"] for row in rows if row["name"] == OURS and "residues_per_second" in row]
        lines = [
            f"ESM-2 {model}, {SETS[chosen]}:",
            "",
            "| | residues/s | longlens bfloat16 is faster by | peak MiB | share of the matrix-product rate |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in rows:
            if "residues_per_second" not in row:
                lines.append(f"| {row['name']} | {row['not_run']} | | | |")
                continue
            rate = row["residues_per_second"]
            ratio = f"{rates[0] / rate:.2f}x" if rates else ""
            share = row["gflops"] / row["product_gflops"]
            lines.append(f"| {row['name']} | {rate:,.0f} | {ratio} | {row['peak_mib']:,.0f} | {share:.0%} |")
        parts.append("\n".join(lines))
    page.write_text(before + START + "\n\n" + "\n\n".join(parts) + "\n\n" + END + rest.split(END, 1)[1])


def write_model(name: str, folder: Path) -> EncoderConfig:
    """A random-weight ESM-2 in transformers' format."""
    layers, width, heads = SHAPES[name]
    config = EncoderConfig(len(ESM), layers, width, heads, 4 * width)
    torch.manual_seed(0)
    model = MaskedLM(config, ESM)
    save(model, folder)
    # esm-cpp wants the rotary frequencies in every layer, as the oldest checkpoints have them
    tensors = load_file(folder / "model.safetensors")
    frequencies = tensors.pop("esm.rotary_embeddings.inv_freq")
    name = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
    tensors |= {name.format(layer): frequencies.clone() for layer in range(layers)}
    save_file(tensors, folder / "esm-cpp.safetensors")
    return config


def run(contender: tuple[str, str, str, int, int, bool], model: str, folder: Path, proteins: list[str],
        given: argparse.Namespace) -> dict[str, Any]:  # fmt: skip
    _, kind, dtype, batch, tokens, sort = contender
    python = sys.executable
    if kind == "esm-cpp":
        if given.esm_cpp_python is None:
            return {"not_run": "no --esm-cpp-python"}
        python = given.esm_cpp_python
    task = {
        "contender": kind, "dtype": dtype, "batch": batch, "tokens": tokens, "sorted": sort, "model": str(folder),
        "shape": SHAPES[model], "sequences": proteins, "seconds": given.seconds,
        "threads": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    done = subprocess.run([python, str(HERE / "embedding_worker.py")], input=json.dumps(task), capture_output=True,
                          text=True, check=False)  # fmt: skip
    if done.returncode:
        return {"not_run": (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def product_rate(config: EncoderConfig, dtype: str) -> float:
    """GFLOP/s of the model's largest matrix product on this machine, the best of several."""
    # whole numbers stand beside float32
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    a, b = torch.randn(4096, config.width, dtype=kind), torch.randn(config.width, config.feed_forward, dtype=kind)
    best, product = 0.0, a @ b
    for _ in range(8):
        begun = time.perf_counter()
        # into memory that is there already, as a model's buffers are
        torch.mm(a, b, out=product)
        best = max(best, 2 * a.shape[0] * b.numel() / (time.perf_counter() - begun) / 1e9)
    return best


if __name__ == "__main__":
    main()
