"""The memory and the threads that a job may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from longlens.errors import InputError
from longlens.jobs.cores import usable_cores
from longlens.jobs.memory import batch_limit, model_size, process_bytes, refuse_large_model, total_limit
from longlens.models.language_model import MaskedLM
from longlens.models.pretrained import load, takes_chains


def load_model(model: str | Path | MaskedLM, dtype: str, device: str, max_memory: str | None = None) -> MaskedLM:
    """The model of a job: a loaded model, or the one that `longlens.load` loads by its name.

    Raises `InputError`, before weights are read, if loading alone takes more than `max_memory`.
    """
    if isinstance(model, MaskedLM):
        return model
    if max_memory is not None:
        refuse_large_model(model_size(model, dtype, device), max_memory)
    return load(model, dtype=dtype, device=device)


def chains_of(*models: str | Path | MaskedLM) -> Callable[[], bool]:
    """Whether all of the models take complexes of several chains; their files are read when it is asked first."""

    @cache
    def taken() -> bool:
        return all(
            model.alphabet.chain_break is not None if isinstance(model, MaskedLM) else takes_chains(model)
            for model in models
        )

    return taken


def memory_limit(model: nn.Module, max_memory: str | None) -> int:
    """Bytes that a unit of work may take, on the model's device. Raises `InputError` if nothing is left."""
    parameter = next(model.parameters())
    total = total_limit(max_memory, parameter.device)
    on_cpu = parameter.device.type == "cpu"
    in_use = process_bytes() if on_cpu else sum(tensor.nbytes for tensor in model.state_dict().values())
    return batch_limit(total, in_use, parameter.device)


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """Run with this number of threads, and restore the number afterwards; None changes nothing. Raises `InputError`."""
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
    """The default of the commands: OMP_NUM_THREADS if it is set, otherwise all cores that the process may use."""
    from_environment = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(from_environment) if from_environment.isdigit() and int(from_environment) else usable_cores()
