"""The registry as rows: each published model with what it can do, and the models that are not served."""

from __future__ import annotations

from typing import Any

from longlens.models.families.others import OTHERS
from longlens.models.families.registry import FAMILIES


def list_served() -> list[dict[str, Any]]:
    """A row for each published model of each family.

    `scores` and `surprise`: whether it has a language model's head. `contacts`: "own" if
    the weights of a contact head come with it, else "fitted", by `longlens contacts fit`.
    """
    return [
        {
            "model": known.name,
            "family": family.name,
            "parameters": known.parameters,
            "layers": known.layers,
            "width": known.width,
            "heads": known.heads,
            "limit": known.limit,
            "licence": known.licence,
            "score": family.predicts,
            "surprise": family.predicts,
            "contacts": "own" if known.contacts else "fitted",
            "note": known.note or family.note,
        }
        for family in FAMILIES
        for known in family.known
    ]


def list_others() -> list[dict[str, Any]]:
    """A row for each protein model that is not served: why, and whether `longlens.hf.attach` serves it."""
    return [{"model": other.name, "reason": other.reason, "attach": other.attach} for other in OTHERS]
