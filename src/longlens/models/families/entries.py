"""The entries of a configuration, checked as they are read, and the sizes that transformers' BERT and ESM share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from longlens.errors import CheckpointError
from longlens.models.parts.head import Head
from longlens.models.parts.norm import Norm

# far above any model; larger numbers in a file are refused before anything is allocated
MOST = 10_000_000
ELSEWHERE = "other models of transformers run with longlens.hf.attach"


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

    def refuse(self, expected: str, refused: Mapping[str, tuple[bool, str]]) -> None:
        """Raise `CheckpointError` for an entry that differs; `refused`: the entry -> whether it does, and what that
        makes of the model."""
        for entry, (differs, name) in refused.items():
            if differs:
                shown = self.entries.get(entry)
                raise CheckpointError(
                    f"{self.where}: expected {expected}, got {name}: {entry} = {shown!r:.60}; {ELSEWHERE}"
                )


def check_heads(width: int, heads: int, where: str) -> None:
    """Raise `CheckpointError` unless the width is a multiple of the heads."""
    if width % heads:
        raise CheckpointError(f"{where}: expected the width to be a multiple of the heads, got {width} and {heads}")


def sizes_of(settings: ConfigEntries) -> dict[str, Any]:
    """Sizes, norm and head of an encoder that is configured as transformers' BERT is."""
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
