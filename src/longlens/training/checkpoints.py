"""Training state on disk: a checkpoint is complete or not there, and going on from it equals never having stopped."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from longlens.errors import CheckpointError
from longlens.io.results import write_whole

NAME = "checkpoint.pt"


class Part(Protocol):
    """What has a state: a model, an optimiser, a schedule, a stream of crops."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


def write_checkpoint(folder: Path, settings: dict[str, Any], parts: Mapping[str, Part], step: int) -> None:
    """Replace the folder's checkpoint in one step: a crash leaves the old one."""
    state = {"settings": settings, "step": step, "parts": {name: part.state_dict() for name, part in parts.items()}}
    file = io.BytesIO()
    torch.save(state, file)
    write_whole(folder / NAME, file.getvalue())


def read_checkpoint(folder: Path, settings: dict[str, Any], parts: Mapping[str, Part]) -> int:
    """Give `parts` the state of the folder's checkpoint; the step it was written at, 0 where there is none.

    Raises `CheckpointError` where its settings differ from `settings`.
    """
    path = folder / NAME
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    before = state["settings"]
    changed = [
        f"{name} was {before.get(name)!r}, is {settings.get(name)!r}"
        for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)
    ]  # fmt: skip
    if changed:
        raise CheckpointError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}; give the same ones or another folder"
        )
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    return int(state["step"])
