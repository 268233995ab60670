"""How the checkpoint of a model was written, so that the model can be written so again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longlens.models.config import EncoderConfig
from longlens.models.families.names import TensorNames


@dataclass(frozen=True)
class WrittenForm:
    """The form of a folder: what its tensors mean and are called, and the files beside them.

    `config`: the encoder that the files describe. `originals`: name here -> name and shape in the file.
    `files`: the content of config.json, and of those of the vocabulary or tokenizer, by name; they are small.
    """

    names: TensorNames
    config: EncoderConfig
    originals: Mapping[str, tuple[str, tuple[int, ...]]]
    files: Mapping[str, bytes]
