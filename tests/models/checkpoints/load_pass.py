"""Loading a checkpoint, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from longlens.models.pretrained import load


def load_pass(folder: str, dtype: str) -> Callable[[], object]:
    """A function that loads the checkpoint."""
    return lambda: load(Path(folder), dtype=dtype, device="cpu")
