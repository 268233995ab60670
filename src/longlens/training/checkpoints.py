"""Training state on disk: a checkpoint is complete or not there, and going on from it equals never having stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from longlens.errors import CheckpointError

NAME = "checkpoint.pt"


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace the folder's checkpoint in one step: a crash leaves the old one."""
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / f"{NAME}.half"
    with half.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(folder / NAME)


def read_checkpoint(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The folder's checkpoint, or None; raises `CheckpointError` where its settings differ from `settings`."""
    path = folder / NAME
    if not path.is_file():
        return None
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
    return state
