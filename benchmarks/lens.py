"""The lens beside attention itself, and beside making the matrix.

    python benchmarks/lens.py            speed, memory growth, one layer at N = 65,536; about ten minutes on two cores
    python benchmarks/lens.py speed      some

Speeds are taken in rounds in which PyTorch's fused attention and all contenders get the same queries and keys, in an
order that rotates; a ratio is the median over the rounds, with its range. Memory is the growth of a process's peak
beyond its inputs. Writes benchmarks/results/lens_<date>.json and the table in docs/lens.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness import (
    DOCS,
    GIB,
    HERE,
    MIB,
    facts,
    fill,
    interleave,
    machine_line,
    peak_bytes,
    ratio,
    run_measured,
    show_ratio,
    table,
    today,
    write_json,
)
from lens_pass import SETS
from longlens import scan
from longlens.testing import peak_growths


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
    contenders["sdpa"] = lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value)
    taken = interleave(contenders, rounds)
    return {
        "length": length, "heads": heads, "width": width, "rounds": rounds,
        "sdpa_seconds": statistics.median(taken["sdpa"]),
        # how many times as long as fused attention
        "times_sdpa": {name: ratio(seconds, taken["sdpa"]) for name, seconds in taken.items()},
        "materialised_by_standard": ratio(taken["materialised"], taken["standard"]),
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
    child = run_measured([sys.executable, str(Path(__file__).resolve()), "child"])
    if child.status:
        raise SystemExit(f"the long scan failed: {child.status}")
    return dict(json.loads(child.output.splitlines()[-1]))


def long_child(length: int = 65_536, heads: int = 8) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, heads, length, 64)
    begun = time.perf_counter()
    results = scan(query, key, collect=(*SETS["standard"], *SETS["pooled"]))
    seconds = time.perf_counter() - begun
    assert torch.allclose(results["received"].values.sum(-1), torch.tensor(float(length)), rtol=1e-4)  # type: ignore[attr-defined]
    print(json.dumps({"length": length, "heads": heads, "seconds": seconds, "peak_gib": peak_bytes() / GIB}))


def page_text(data: dict[str, Any]) -> str:
    """The table, as docs/lens.md has it."""
    fast, memory_, far = data["speed"], data["memory"], data["long"]
    growth = {row["set"]: row for row in memory_["rows"]}
    names = {
        "received": "attention received",
        "standard": "log-sum-exp, entropy, largest, distance, received, top 8",
        "pooled": "map in 256 x 256 cells",
    }
    rows = []
    for name, label in names.items():
        small, large = growth[name]["mib"]
        rows.append([label, show_ratio(fast["times_sdpa"][name]), f"{small:.0f}, {large:.0f}"])
    rows.append(["the six from the whole matrix", show_ratio(fast["times_sdpa"]["materialised"]), "N x N"])
    lengths = f"{memory_['lengths'][0]:,} and {memory_['lengths'][1]:,}"
    return "\n".join([
        f"{machine_line(data['machine'])}; float32, {fast['heads']} heads of width {fast['width']}, "
        f"N = {fast['length']:,}; time relative to PyTorch's fused attention forward ({fast['sdpa_seconds']:.2f} s), "
        f"median and range of {fast['rounds']} rounds.",
        "",
        table(["", "time, of fused attention's", f"peak growth, MiB, N = {lengths}"], rows),
        f"At N = {far['length']:,}, {far['heads']} heads, all of these take {far['seconds']:.0f} s and a process of "
        f"{far['peak_gib']:.1f} GiB; the matrix would be {4 * far['heads'] * far['length'] ** 2 / GIB:.0f} GiB.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["speed", "memory", "long", "child", []])
    chosen = parser.parse_args()
    if chosen.parts == ["child"]:
        long_child()
        return
    target, data = today("lens")
    data["machine"] = facts()
    data.pop("rows", None)
    for name, part in (("speed", speed), ("memory", memory), ("long", long)):
        if not chosen.parts or name in chosen.parts:
            data[name] = part()
            print(name, json.dumps(data[name]), flush=True)
            write_json(target, data)
    if all(name in data for name in ("speed", "memory", "long")):
        fill(DOCS / "lens.md", "lens.py", page_text(data))


if __name__ == "__main__":
    main()
