"""The value that the reader of each format hands to `build`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longlens.io.alphabet import Alphabet
from longlens.models.checkpoints.tensors import CheckpointTensors
from longlens.models.encoder import EncoderConfig
from longlens.models.families.names import TensorNames


@dataclass(frozen=True)
class Checkpoint:
    """The source, the tensors under the names of their format, and what these names mean.

    `predicts`: whether the head of a masked language model is required; otherwise it is optional.
    `notice`: a warning for who loads it. `files`: those of a folder in transformers' format that describe
    the model and its tokens (`folder_format.descriptions`).
    """

    source: str
    tensors: CheckpointTensors
    names: TensorNames
    config: EncoderConfig
    alphabet: Alphabet
    predicts: bool = True
    notice: str = ""
    files: tuple[Path, ...] = ()
