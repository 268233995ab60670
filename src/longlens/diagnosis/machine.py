"""The machine: processor, cores, memory, and GPUs. Works without PyTorch."""

from __future__ import annotations

import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlens.jobs.cores import usable_cores

# Linux: the processor, and what the driver of NVIDIA's GPUs leaves there
CPU_INFO = Path("/proc/cpuinfo")
DRIVER = Path("/proc/driver/nvidia/version")
# instruction sets that the speed of matrix products depends on
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


@dataclass(frozen=True)
class Gpu:
    """A GPU that PyTorch can use; memory in bytes."""

    name: str
    capability: str
    memory: int
    free: int


@dataclass(frozen=True)
class Machine:
    """The machine and what this process may use of it; memory in bytes.

    `threads` are those of PyTorch by default, None without PyTorch. `driver` says that a driver of NVIDIA's GPUs is
    here, whether or not PyTorch can use it.
    """

    system: str
    cpu: str
    instructions: tuple[str, ...]
    cores: int
    threads: int | None
    memory: int
    free: int
    gpus: tuple[Gpu, ...]
    driver: bool


def inspect_machine(torch: Any) -> Machine:
    """The machine. `torch` is the module, or None where it cannot be imported."""
    import psutil

    memory = psutil.virtual_memory()
    cpu, instructions = _processor()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=cpu,
        instructions=instructions,
        cores=usable_cores(),
        threads=None if torch is None else torch.get_num_threads(),
        memory=memory.total,
        free=memory.available,
        gpus=() if torch is None else _gpus(torch),
        driver=DRIVER.exists() or shutil.which("nvidia-smi") is not None,
    )


def _processor() -> tuple[str, tuple[str, ...]]:
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # macOS
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    have = flags.group(1).split() if flags else []
    return (
        name.group(1).strip() if name else platform.processor() or platform.machine(),
        tuple(flag for flag in INSTRUCTIONS if flag in have),
    )


def _gpus(torch: Any) -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    found = []
    for number in range(torch.cuda.device_count()):
        free, memory = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        found.append(Gpu(torch.cuda.get_device_name(number), f"{major}.{minor}", memory, free))
    return tuple(found)
