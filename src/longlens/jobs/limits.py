"""The memory and the threads that a job may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from longlens.errors import InputError
from longlens.jobs.plan import SHARE, Outputs, free_bytes, parse_bytes, peak_memory, token_budget
from longlens.models.language_model import MaskedLM
from longlens.models.pretrained import load

# of the control group that this process is in, in Linux
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def load_model(model: str | Path | MaskedLM, dtype: str, device: str) -> MaskedLM:
    """The model of a job: one that is there already, or what `longlens.load` makes of its name."""
    return model if isinstance(model, MaskedLM) else load(model, dtype=dtype, device=device)


def memory_limits(
    model: MaskedLM, outputs: Outputs, max_memory: str | None, tokens_per_batch: int | str
) -> tuple[int, int]:
    """Bytes that a batch may take, and tokens to a batch ("auto": what fits into them). Raises `InputError`."""
    if max_memory is None:
        limit = int(SHARE * free_bytes(model.device))
    else:
        # what the process and the weights hold already counts
        held = peak_memory() if model.device.type == "cpu" else 0
        limit = parse_bytes(max_memory) - held
        if limit <= 0:
            raise InputError(
                f"expected --max-memory above the {held / 2**30:.1f} GiB that the model takes, got {max_memory}"
            )
    if tokens_per_batch == "auto":
        return limit, token_budget(model, limit, outputs)
    if not str(tokens_per_batch).isdigit() or int(tokens_per_batch) < 1:
        raise InputError(f"expected --tokens-per-batch auto or a whole number, got {tokens_per_batch!r}")
    return limit, int(tokens_per_batch)


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        # no control group, or one of the first version
        pass
    return cores


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """Run with so many threads, then with as many as before; None changes nothing. Raises `InputError`."""
    if threads is None:
        yield
        return
    if threads < 1:
        raise InputError(f"expected at least 1 thread, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_threads() -> int:
    """What the commands use: OMP_NUM_THREADS where it is set, otherwise all cores that the process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(asked) if asked.isdigit() and int(asked) else usable_cores()
