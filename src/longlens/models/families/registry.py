"""All families, and which of them a config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longlens.errors import CheckpointError
from longlens.models.families.amplify import AMPLIFY
from longlens.models.families.bert import BERT
from longlens.models.families.entries import ELSEWHERE
from longlens.models.families.esm1 import ESM1
from longlens.models.families.esm2 import ESM2
from longlens.models.families.esmc import ESMC
from longlens.models.families.family import Family
from longlens.models.families.others import other_named
from longlens.models.families.saprot import SAPROT
from longlens.models.families.t5 import ANKH, PROTT5

FAMILIES: tuple[Family, ...] = (SAPROT, ESM2, ESM1, ESMC, AMPLIFY, PROTT5, ANKH, BERT)


def family_of(entries: Mapping[str, Any], where: str) -> Family:
    """The family of a configuration. Raises a `CheckpointError` that names any other architecture."""
    other = other_named(entries)
    if other is not None:
        how = "longlens.hf.attach serves it" if other.attach else "longlens.hf.attach does not serve it either"
        raise CheckpointError(f"{where}: expected {served_names()}, got {other.name}: {other.reason}; {how}")
    for family in FAMILIES:
        if family.recognises(entries):
            return family
    kind, names = entries.get("model_type"), class_names(entries)
    shown = f"{kind!r:.60}{f' ({names[0]})' if names else ''}"
    raise CheckpointError(f"{where}: expected {served_names()}, got model_type {shown}; {ELSEWHERE}")


def served_names() -> str:
    """The families' names, for messages."""
    *names, last = (family.name for family in FAMILIES)
    return f"{', '.join(names)} or {last}"


def class_names(entries: Mapping[str, Any]) -> list[str]:
    """The classes of transformers that wrote the checkpoint, if the configuration names them."""
    names = entries.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
