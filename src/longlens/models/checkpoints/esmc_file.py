"""The `.pth` files of the package `esm`: ESM-C's tensors, whose shapes tell its sizes."""

from __future__ import annotations

from pathlib import Path

from longlens.models.checkpoints.checkpoint import Checkpoint
from longlens.models.checkpoints.tensors import CheckpointTensors, TorchFile
from longlens.models.families.esmc import ALPHABET, PACKAGE, config_of_package


def read_esmc_file(path: Path) -> Checkpoint:
    """An ESM-C file. Raises `CheckpointError` for other tensors, and for a broken file."""
    tensors = CheckpointTensors([TorchFile(path)], PACKAGE.name)
    config = config_of_package({name: info.shape for name, info in tensors.infos.items()}, str(path))
    return Checkpoint(str(path), tensors, PACKAGE, config, ALPHABET)
