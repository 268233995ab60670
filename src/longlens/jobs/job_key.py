"""The key of a job, which is everything that decides its results, and their description: model, versions, machine."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longlens.io.survey import Survey
from longlens.models.language_model import MaskedLM

# names of folders that do not describe the model in them
_PLAIN = re.compile(r"model|models|checkpoint|checkpoints|final|best|weights|[0-9a-f]{32,}")


def job_key(model: ModelInfo, survey: Survey, options: dict[str, Any]) -> dict[str, Any]:
    """The key of a job: everything that decides its results, as plain JSON."""
    return {
        "inputs": survey.inputs,
        "model": {"sha256": model.sha256, "dtype": model.dtype} | model.reading,
        "options": options,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of longlens and PyTorch."""
    return {name: _version(name) for name in ("longlens", "torch")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        # a source tree that was never installed
        return "unknown"


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model and its description in results. `source` is the name, folder or file that the user gave."""

    module: nn.Module
    source: str

    @property
    def name(self) -> str:
        """A short name for titles and columns."""
        return model_name(self.source)

    @property
    def language_model(self) -> MaskedLM:
        """The model as the type that all jobs but `look` need."""
        assert isinstance(self.module, MaskedLM)
        return self.module

    @property
    def dtype(self) -> str:
        """Such as "float32"."""
        return str(self._parameter.dtype).split(".")[-1]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._parameter.device

    @property
    def reading(self) -> dict[str, dict[str, str]]:
        """How the model reads sequences, where that was chosen."""
        settings = self.module.alphabet.settings if isinstance(self.module, MaskedLM) else {}
        return {"reading": settings} if settings else {}

    @property
    def _parameter(self) -> torch.Tensor:
        return next(parameter for parameter in self.module.parameters())

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of all weights with their names, shapes and dtypes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def described(self) -> dict[str, Any]:
        """For a manifest."""
        path = Path(self.source)
        return {
            "name": self.name,
            "source": str(path.resolve()) if path.exists() else self.source,
            "sha256": self.sha256,
            "dtype": self.dtype,
        } | self.reading


def model_name(source: str) -> str:
    """The last descriptive part of a path or hub name: `runs/human/model` is "human"."""
    path = Path(source)
    parts = list((path.resolve() if path.exists() else path).parts)
    hub = next((part for part in parts if part.startswith("models--")), None)
    if hub is not None:
        # the hub's cache: models--facebook--esm2_t6_8M_UR50D/snapshots/<revision>
        return hub.split("--")[-1]
    while len(parts) > 1 and _PLAIN.fullmatch(parts[-1].removesuffix(".pt")):
        parts.pop()
    return parts[-1].removesuffix(".pt") if parts and parts[-1] != os.sep else source


def this_run() -> dict[str, Any]:
    """Date, command, machine and versions for a manifest; kernels for other instruction sets round differently."""
    return {
        "started": now(),
        "command": _command(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _command() -> str:
    """The command line, or, in Python, the program that called."""
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    line = f"{name} {shlex.join(sys.argv[1:])}".rstrip()
    return line if name in ("longlens", "python -m longlens") else f"a call in Python, by {line or 'an interpreter'}"


def machine() -> dict[str, str]:
    """The properties of the machine that may change the last digits: architecture, instruction set, GPU."""
    kind = {"architecture": platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability()}
    if torch.cuda.is_available():
        kind["gpu"] = torch.cuda.get_device_name()
    return kind


def now() -> str:
    """The date and time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
