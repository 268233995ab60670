"""Training state on disk: a checkpoint is complete or not there, and going on from it equals never having stopped."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from longlens.errors import CheckpointError
from longlens.io.results import write_whole

NAME = "checkpoint.pt"
# as it was before the learning rate began to fall: a run of more steps continues from it
STABLE = "stable.pt"


class Stateful(Protocol):
    """What has a state: a model, an optimiser, a schedule, a stream of crops."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True)
class CheckpointStep:
    """The step at which a checkpoint was written, and how many the run was to have (None: not recorded)."""

    step: int
    steps: int | None


def write_checkpoint(
    folder: Path, settings: dict[str, Any], parts: Mapping[str, Stateful], reached: CheckpointStep, name: str = NAME
) -> None:
    """Replace the folder's checkpoint in one step: a crash leaves the old one."""
    state = {
        "settings": settings, "step": reached.step, "steps": reached.steps,
        "parts": {part: value.state_dict() for part, value in parts.items()},
    }  # fmt: skip
    file = io.BytesIO()
    torch.save(state, file)
    write_whole(folder / name, file.getvalue())


def find_checkpoint(folder: Path, name: str = NAME) -> CheckpointStep | None:
    """How far a checkpoint is; None where there is none."""
    path = folder / name
    if not path.is_file():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return CheckpointStep(int(state["step"]), state.get("steps"))


def read_checkpoint(folder: Path, settings: dict[str, Any], parts: Mapping[str, Stateful], name: str = NAME) -> int:
    """Give `parts` the state of a checkpoint that is there; the step at which it was written.

    Raises `CheckpointError` where its settings differ from `settings`.
    """
    state = torch.load(folder / name, map_location="cpu", weights_only=True)
    before = state["settings"]
    changed = [
        f"{setting} was {before.get(setting)!r}, is {settings.get(setting)!r}"
        for setting in sorted({*before, *settings}) if before.get(setting) != settings.get(setting)
    ]  # fmt: skip
    if changed:
        raise CheckpointError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}; give the same ones or another folder"
        )
    for part, value in parts.items():
        value.load_state_dict(state["parts"][part])
    return int(state["step"])
