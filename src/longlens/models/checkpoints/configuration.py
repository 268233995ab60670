"""The config.json of transformers, checked: the architecture that it describes, and its sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlens.errors import CheckpointError
from longlens.io.alphabet import ESM
from longlens.models.config import EncoderConfig
from longlens.models.parts.head import Head
from longlens.models.parts.norm import Norm
from longlens.models.parts.positions import LearnedPositions

# far above any model; larger numbers in a file are refused before anything is allocated
MOST = 10_000_000
_ELSEWHERE = "other models of transformers run with longlens.hf.attach"


class ConfigEntries:
    """The entries of a configuration, each checked when it is read. `where` is used in messages."""

    def __init__(self, entries: Mapping[str, Any], where: str) -> None:
        self.entries = entries
        self.where = where

    def size(self, name: str) -> int:
        """A whole number of at least 1."""
        if name not in self.entries:
            raise CheckpointError(f"{self.where}: expected an entry {name!r}, found none")
        return self._whole(name, self.entries[name], 1)

    def token(self, name: str, default: int, vocabulary: int) -> int:
        """The number of a token, or `default` if there is no entry."""
        number = self._whole(name, self.entries.get(name, default), 0)
        if number >= vocabulary:
            raise CheckpointError(f"{self.where}: expected {name} below the vocabulary of {vocabulary}, got {number}")
        return number

    def flag(self, name: str) -> bool:
        """True or false; false if there is no entry."""
        value = self.entries.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: expected {name} to be true or false, got {value!r:.60}")
        return value

    def epsilon(self, name: str, default: float) -> float:
        """A number in (0, 1]."""
        value = self.entries.get(name, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not 0 < value <= 1:
            raise CheckpointError(f"{self.where}: expected {name} to be a number in (0, 1], got {value!r:.60}")
        return float(value)

    def _whole(self, name: str, value: Any, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
            raise CheckpointError(
                f"{self.where}: expected {name} to be a whole number from {least} to {MOST:,}, got {value!r:.60}"
            )
        return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got something else ({error}); fetch it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}; fetch it again")
    return content


def architecture(entries: Mapping[str, Any], folder: Path) -> str:
    """ "esm" or "bert". Raises a `CheckpointError` that names any other architecture."""
    kind = entries.get("model_type")
    if kind in ("esm", "bert"):
        return str(kind)
    names = class_names(entries)
    raise CheckpointError(
        f"{folder}: expected ESM-2 or BERT, model_type esm or bert, got {kind!r:.60}"
        f"{f' ({names[0]})' if names else ''}; {_ELSEWHERE}"
    )


def class_names(entries: Mapping[str, Any]) -> list[str]:
    """The classes of transformers that wrote the checkpoint, if the configuration names them."""
    names = entries.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def encoder_config(entries: Mapping[str, Any], folder: Path) -> EncoderConfig:
    """The encoder of an ESM-2 or BERT model.

    Raises `CheckpointError` for another architecture, naming it and the entry that shows it, and for entries that are
    missing, of a wrong type or out of range.
    """
    settings = ConfigEntries(entries, str(folder / "config.json"))
    if architecture(entries, folder) == "esm":
        _refuse_other_esm(settings)
        return rotary_config(_sizes(settings), settings)
    _refuse_other_bert(settings)
    sizes = _sizes(settings)
    return EncoderConfig(
        **sizes, pre_norm=False, positions=LearnedPositions(settings.size("max_position_embeddings")),
        token_dropout=False,
    )  # fmt: skip


def rotary_config(sizes: dict[str, Any], settings: ConfigEntries) -> EncoderConfig:
    """The configuration of an ESM-2 encoder of these sizes."""
    if sizes["width"] // sizes["heads"] % 2:
        raise CheckpointError(
            f"{settings.where}: expected an even width of each head for rotary positions, got "
            f"{sizes['width']} / {sizes['heads']}"
        )
    mask = settings.token("mask_token_id", ESM.require_mask(), sizes["vocabulary"])
    return EncoderConfig(**sizes, token_dropout=settings.flag("token_dropout"), mask_token=mask)


def check_heads(width: int, heads: int, where: str) -> None:
    """Raise `CheckpointError` unless the width is a multiple of the heads."""
    if width % heads:
        raise CheckpointError(f"{where}: expected the width to be a multiple of the heads, got {width} and {heads}")


def _sizes(settings: ConfigEntries) -> dict[str, Any]:
    norm = Norm(eps=settings.epsilon("layer_norm_eps", 1e-12))
    sizes: dict[str, Any] = {
        "vocabulary": settings.size("vocab_size"),
        "layers": settings.size("num_hidden_layers"),
        "width": settings.size("hidden_size"),
        "heads": settings.size("num_attention_heads"),
        "feed_forward": settings.size("intermediate_size"),
        "norm": norm,
        "head": Head(norm=norm),
    }
    check_heads(sizes["width"], sizes["heads"], settings.where)
    return sizes


def _refuse_other_esm(settings: ConfigEntries) -> None:
    entries = settings.entries
    learned = "ESM-1b or ESM-1v, whose positions are learned"
    _refuse(
        settings, "ESM-2",
        {
            "is_folding_model": (bool(entries.get("is_folding_model")), "ESMFold"),
            "position_embedding_type": (entries.get("position_embedding_type", "absolute") != "rotary", learned),
            "emb_layer_norm_before": (bool(entries.get("emb_layer_norm_before")), learned),
            "hidden_act": (entries.get("hidden_act", "gelu") != "gelu", "a model with another activation"),
        },
    )  # fmt: skip


def _refuse_other_bert(settings: ConfigEntries) -> None:
    entries = settings.entries
    positions = entries.get("position_embedding_type", "absolute")
    _refuse(
        settings, "BERT's encoder with gelu",
        {
            "is_decoder": (bool(entries.get("is_decoder")), "a decoder"),
            "position_embedding_type": (positions != "absolute", "a BERT with other positions"),
            "hidden_act": (entries.get("hidden_act", "gelu") != "gelu", "a BERT with another activation"),
        },
    )  # fmt: skip


def _refuse(settings: ConfigEntries, expected: str, refused: Mapping[str, tuple[bool, str]]) -> None:
    """`refused`: the entry -> whether it differs, and what that makes of the model."""
    for entry, (differs, name) in refused.items():
        if differs:
            shown = settings.entries.get(entry)
            raise CheckpointError(
                f"{settings.where}: expected {expected}, got {name}: {entry} = {shown!r:.60}; {_ELSEWHERE}"
            )
