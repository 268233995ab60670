"""A family of models: everything that loading one needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlens.errors import CheckpointError
from longlens.io.alphabet import Alphabet
from longlens.models.config import EncoderConfig
from longlens.models.families.entries import ConfigEntries
from longlens.models.families.names import TensorNames

# names of a layer in transformers' BERT and ESM, and of the parts of an encoder that is saved without its head
HF_LAYER = "encoder.layer.{i}."
HF_PARTS = ("embeddings.", "encoder.", "rotary_embeddings.", "contact_head.", "pooler.")


@dataclass(frozen=True)
class Known:
    """A published model: the name that `longlens.load` takes, its sizes, and the licence of its weights.

    `limit`: the most residues of a protein, None where there is none. `contacts`: whether the weights of a contact head
    come with it. `note`: what a user should know.
    """

    name: str
    layers: int
    width: int
    heads: int
    parameters: str
    licence: str
    limit: int | None = None
    contacts: bool = False
    note: str = ""


@dataclass(frozen=True)
class Family:
    """A family: how it is recognised in a config.json, and what is read from it.

    `recognises`: whether the entries of a config.json are this family's. `config`: its encoder; raises
    `CheckpointError`. `layouts`: the names of its tensors, in each kind of checkpoint that there is. `alphabet`: of a
    folder. `known`: its published models. `predicts`: whether it has a language model's head. `note`: what a user of
    any of its models should know. `notice`: what loading one says as a warning, such as a licence.
    `chains`: whether its models take complexes of several chains.
    """

    name: str
    recognises: Callable[[Mapping[str, Any]], bool]
    config: Callable[[ConfigEntries], EncoderConfig]
    layouts: tuple[TensorNames, ...]
    alphabet: Callable[[Path, EncoderConfig], Alphabet]
    known: tuple[Known, ...] = ()
    predicts: bool = True
    note: str = ""
    notice: str = ""
    chains: bool = False


def modern_name(name: str) -> str:
    """The name of a tensor since the oldest checkpoints, which called LayerNorm's parameters gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """The tokens of a vocab.txt. Raises `CheckpointError` if it cannot be read."""
    if not path.is_file():
        raise CheckpointError(f"expected a vocabulary at {path}, found none")
    try:
        return tuple(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected tokens in UTF-8, one a line ({error}); fetch it again") from None
