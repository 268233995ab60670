"""The lens beside attention itself, and beside making the matrix.

    python benchmarks/lens.py            speed, memory growth, one layer at N = 65,536; about ten minutes on two cores
    python benchmarks/lens.py speed      some

Speeds are taken in rounds, each of PyTorch's fused attention and then the contenders; a ratio is the median over the
rounds. Memory is the growth of a process's peak beyond its inputs. Writes benchmarks/results/lens_<date>.json and the
tables in docs/lens.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import measure
from lens_pass import SETS
from longlens.lens.scan import scan
from longlens.testing import peak_growths

HERE = Path(__file__).resolve().parent
MIB = 1024 * 1024
START, END = "<!-- made by benchmarks/lens.py -->", "<!-- end -->"


def materialised(query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
    """The standard set from the whole matrix, as it is usually written."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    p = scores.softmax(-1)
    i = torch.arange(query.shape[2])
    distance = (i - i.unsqueeze(1)).abs().to(p.dtype)
    return [
        scores.logsumexp(-1), -(p * p.clamp_min(1e-30).log()).sum(-1), p.amax(-1), (p * distance).sum(-1), p.sum(-2),
        *p.topk(8),
    ]  # fmt: skip


def speed(rounds: int = 7, length: int = 4096, heads: int = 8, width: int = 64) -> dict[str, Any]:
    """Time relative to PyTorch's fused attention, forward, float32."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, heads, length, width)
    contenders: dict[str, Callable[[], Any]] = {
        name: (lambda collect=collect: scan(query, key, collect=collect)) for name, collect in SETS.items()
    }
    contenders["materialised"] = lambda: materialised(query, key)
    taken: dict[str, list[float]] = {name: [] for name in ("sdpa", *contenders)}
    for number in range(rounds + 1):
        calls = {"sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value)} | contenders
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            # the first round warms up
            if number:
                taken[name].append(time.perf_counter() - begun)
    ratios = {
        name: statistics.median(own / base for own, base in zip(seconds, taken["sdpa"], strict=True))
        for name, seconds in taken.items()
    }
    apart = [whole / own for whole, own in zip(taken["materialised"], taken["standard"], strict=True)]
    return {
        "length": length, "heads": heads, "width": width, "rounds": rounds,
        "sdpa_seconds": statistics.median(taken["sdpa"]), "times_sdpa": ratios,
        "materialised_by_standard": statistics.median(apart),
    }  # fmt: skip


def memory() -> dict[str, Any]:
    """Peak growth at N and 2 N, 4 heads of width 64, beyond the inputs."""
    rows = []
    for name in SETS:
        cases = [{"name": name, "length": length} for length in (8192, 16384)]
        small, large = peak_growths(
            "lens_pass:lens_pass", cases, path=[str(HERE)], warm_up={"name": name, "length": 512}, runs=1
        )
        rows.append({"set": name, "mib": [small / MIB, large / MIB], "ratio": large / small})
    return {"lengths": [8192, 16384], "heads": 4, "rows": rows}


def long() -> dict[str, Any]:
    """One layer of 8 heads at N = 65,536, the standard set and a pooled map: seconds, and the process's peak."""
    child = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "child"], capture_output=True, text=True, check=True
    )
    return dict(json.loads(child.stdout.splitlines()[-1]))


def long_child(length: int = 65_536, heads: int = 8) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, heads, length, 64)
    begun = time.perf_counter()
    found = scan(query, key, collect=(*SETS["standard"], *SETS["pooled"]))
    seconds = time.perf_counter() - begun
    assert torch.allclose(found["received"].values.sum(-1), torch.tensor(float(length)), rtol=1e-4)  # type: ignore[attr-defined]
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    print(json.dumps({"length": length, "heads": heads, "seconds": seconds, "peak_gib": peak}))


def write_page(data: dict[str, Any]) -> None:
    """The table in docs/lens.md, between its marks."""
    page = HERE.parent / "docs" / "lens.md"
    text = page.read_text()
    machine, fast, held, far = data["machine"], data["speed"], data["memory"], data["long"]
    growth = {row["set"]: row for row in held["rows"]}
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}; float32, {fast['heads']} heads of width "
        f"{fast['width']}, N = {fast['length']:,} (PyTorch's fused attention forward: {fast['sdpa_seconds']:.2f} s).",
        "",
        f"| | time, of fused attention's | peak growth, MiB, N = {held['lengths'][0]:,} and {held['lengths'][1]:,} |",
        "|---|---:|---:|",
    ]
    names = {
        "received": "attention received",
        "standard": "log-sum-exp, entropy, largest, distance, received, top 8",
        "pooled": "map in 256 x 256 cells",
    }
    for name, label in names.items():
        small, large = growth[name]["mib"]
        lines.append(f"| {label} | {fast['times_sdpa'][name]:.2f} | {small:.0f}, {large:.0f} |")
    lines.append(f"| the six from the whole matrix | {fast['times_sdpa']['materialised']:.2f} | N x N |")
    lines += [
        "",
        f"At N = {far['length']:,}, {far['heads']} heads, all of these take {far['seconds']:.0f} s and a process of "
        f"{far['peak_gib']:.1f} GiB; the matrix would be {4 * far['heads'] * far['length'] ** 2 / 2**30:.0f} GiB.",
    ]
    before, rest = text.split(START, 1)
    page.write_text(before + START + "\n\n" + "\n".join(lines) + "\n\n" + END + rest.split(END, 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["speed", "memory", "long", "child", []])
    given = parser.parse_args()
    if given.parts == ["child"]:
        long_child()
        return
    target = HERE / "results" / f"lens_{date.today()}.json"
    data = json.loads(target.read_text()) if target.exists() else {}
    data["machine"] = measure.facts("cpu")
    for name, part in (("speed", speed), ("memory", memory), ("long", long)):
        if not given.parts or name in given.parts:
            data[name] = part()
            print(name, json.dumps(data[name]), flush=True)
            target.write_text(json.dumps(data, indent=1) + "\n")
    if all(name in data for name in ("speed", "memory", "long")):
        write_page(data)


if __name__ == "__main__":
    main()
