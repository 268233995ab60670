"""The machine that figures are taken on: what it is, what it may use, how fast its matrix products are."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.pairing import clock

HERE = Path(__file__).resolve().parents[1]
GIB = 2**30
PACKAGES = (
    "longlens", "torch", "numpy", "transformers",
    "performer-pytorch", "linformer", "nystrom-attention", "local-attention",
)  # fmt: skip
Row = dict[str, Any]


def memory_total() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit_memory(share: float = 0.8) -> int:
    """Let this process and each one that it starts take `share` of the machine's memory; beyond that they fail."""
    most = int(memory_total() * share)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    return most


def cpu() -> tuple[str, list[str]]:
    """The processor's name, and those of its instruction sets that speed depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    have = flags.group(1).split() if flags else []
    return model.group(1).strip() if model else platform.machine(), [flag for flag in wanted if flag in have]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of packages, "absent" where one is not installed."""
    numbers = {}
    for package in packages:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = "absent"
    return numbers


def commit() -> str:
    """The commit measured, with a "+" where the library's files differ from it; "" outside a checkout."""

    def git(*arguments: str) -> str:
        try:
            answer = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE, check=False)
        except OSError:  # no git on this machine
            return ""
        return answer.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "../src") else "")


def facts(device: str = "cpu") -> Row:
    """What figures were taken on. No host names and no paths."""
    import torch

    model, flags = cpu()
    return {
        "cpu": model,
        "cpu_flags": flags,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_total() / GIB, 1),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def hardware(device: str = "cpu") -> str:
    """The machine as part of a file name: "amd-epyc-2c"."""
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    else:
        name = f"{cpu()[0]} {cores()}c"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine as a page names it: "AMD EPYC, 2 cores, 2026-11-23"."""
    return f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores, {machine['date']}"


def load() -> float:
    """The machine's load average over the last minute: how many processes were running, or ready to."""
    return round(os.getloadavg()[0], 2)


def load_line(rows: Iterable[Row]) -> str:
    """What the rows of a benchmark recorded of the load, as a page says it."""
    loads = [row["load"] for row in rows if "load" in row]
    if not loads:
        return "The load of the machine was not recorded."
    return (
        f"When a measurement began, at most {max(loads):.1f} processes were running on the machine (its load average)."
    )


def product_rate(dtype: str, shape: tuple[int, int, int] = (4096, 480, 1920), device: str = "cpu") -> float:
    """GFLOP/s of a matrix product (m, k) @ (k, n) in `dtype`, the best of eight, written into memory that is there."""
    import torch

    rows, inner, columns = shape
    kind = getattr(torch, dtype)
    a, b = torch.randn(rows, inner, device=device).to(kind), torch.randn(inner, columns, device=device).to(kind)
    product = a @ b
    now = clock(device)
    best = float("inf")
    for _ in range(8):
        begun = now()
        torch.mm(a, b, out=product)
        best = min(best, now() - begun)
    return 2 * rows * inner * columns / best / 1e9
