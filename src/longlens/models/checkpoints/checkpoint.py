"""A checkpoint as a reader of one format gives it to `build`."""

from __future__ import annotations

from dataclasses import dataclass

from longlens.io.alphabet import Alphabet
from longlens.models.checkpoints.names import TensorNames
from longlens.models.checkpoints.tensors import CheckpointTensors
from longlens.models.encoder import EncoderConfig


@dataclass(frozen=True)
class Checkpoint:
    """Where it came from, its tensors under the names of its format, and what they are.

    `predicts`: whether it has to have the head of a masked language model; otherwise it may.
    """

    source: str
    tensors: CheckpointTensors
    names: TensorNames
    config: EncoderConfig
    alphabet: Alphabet
    predicts: bool = True
