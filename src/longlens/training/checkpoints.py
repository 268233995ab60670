"""Training state on disk: a checkpoint is written whole, and a continued run equals one that was not interrupted."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol
from zipfile import is_zipfile

import torch

from longlens.errors import CheckpointError
from longlens.io.results import write_whole

NAME = "checkpoint.pt"
# the state before the learning rate began to fall, from which a run of more steps continues
STABLE = "stable.pt"


class Stateful(Protocol):
    """An object with a state: a model, an optimiser, a schedule, a stream of crops."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True)
class CheckpointStep:
    """The step at which a checkpoint was written, and the planned number of steps (None: not recorded)."""

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
    """The step of the folder's checkpoint; None if there is no checkpoint."""
    path = folder / name
    if not path.is_file():
        return None
    state = _load(path, mmap=True)
    return CheckpointStep(int(state["step"]), state.get("steps"))


def _load(path: Path, *, mmap: bool) -> dict[str, Any]:
    if not is_zipfile(path):
        raise CheckpointError(f"{path}: expected a checkpoint of longlens train, got a broken one; {_advice(path)}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    except UnpicklingError:
        state = None
    if not isinstance(state, dict) or not {"settings", "step", "parts"} <= state.keys():
        raise CheckpointError(f"{path}: expected a checkpoint of longlens train, got another file; {_advice(path)}")
    return state


def _advice(path: Path) -> str:
    return "give another folder" if path.name == STABLE else "remove it to begin again, or give another folder"


def read_checkpoint(folder: Path, settings: dict[str, Any], parts: Mapping[str, Stateful], name: str = NAME) -> int:
    """Load the state of an existing checkpoint into `parts`; returns the step at which it was written.

    Raises `CheckpointError` if its settings differ from `settings`.
    """
    state = _load(folder / name, mmap=False)
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
