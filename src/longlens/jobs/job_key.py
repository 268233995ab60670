"""What a job is and whether its input is still the same: what keeps results of different jobs apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from longlens.errors import SequenceError
from longlens.io.survey import Entry, Survey
from longlens.models.language_model import MaskedLM


def job_identity(model: MaskedLM, survey: Survey, options: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the results, as plain JSON."""
    return {
        "inputs": survey.inputs,
        "model": {"sha256": _fingerprint(model), "dtype": str(model.dtype).split(".")[-1]},
        "options": options,
        "versions": {name: version(name) for name in ("longlens", "torch")},
    }


def refuse_changed(texts: list[str], entries: Sequence[Entry]) -> None:
    """Raise `SequenceError` unless these are the proteins that the survey saw."""
    for text, entry in zip([*texts, *[""] * (len(entries) - len(texts))], entries, strict=True):
        if hashlib.sha256(text.encode()).hexdigest() != entry.sha256:
            raise SequenceError(
                f"{entry.source}, record {entry.number} ({entry.id}): changed since the job began; give the file as it "
                "was, or another output folder"
            )


def _fingerprint(model: MaskedLM) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
