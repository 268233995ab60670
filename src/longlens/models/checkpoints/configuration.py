"""The config.json of a model: its encoder, without the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlens.errors import CheckpointError
from longlens.models.config import EncoderConfig
from longlens.models.families.entries import ConfigEntries
from longlens.models.families.registry import family_of


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


def encoder_config(entries: Mapping[str, Any], folder: Path) -> EncoderConfig:
    """The encoder of a model of any family.

    Raises `CheckpointError` for another architecture, naming it and the entry that shows it, and for entries that are
    missing, of a wrong type or out of range.
    """
    return family_of(entries, str(folder)).config(ConfigEntries(entries, str(folder / "config.json")))
