"""The file of a fine-tuned head, and what its outputs mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from longlens.errors import CheckpointError
from longlens.finetuning.head import Head
from longlens.finetuning.metrics import confusion, matthews
from longlens.finetuning.targets import Targets, parse_task
from longlens.io.results import write_whole

FILE = "head.safetensors"
MODEL = "model"
# the entry that identifies the file of a head
ENTRY = "longlens fine-tuned head"
# thresholds that are tried
TRIED = 200


@dataclass(frozen=True)
class HeadInfo:
    """What a head is for. `threshold`: of the second of two classes, chosen on validation proteins; None otherwise.

    `base`: `source` of the model whose vectors the head takes, and `sha256` of its weights by dtype
    (`longlens.jobs.base_model`); empty where the folder holds that model.
    """

    task: str
    classes: tuple[str, ...]
    method: str
    threshold: float | None
    hidden: int
    base: dict[str, Any]

    @property
    def targets(self) -> Targets:
        """The task and its classes, without examples."""
        return Targets(parse_task(self.task), [], self.classes)


def save_head(head: Head, info: HeadInfo, path: Path) -> None:
    """Write the head and its description."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    # one entry: safetensors writes several in an order that differs from run to run
    write_whole(path, save_tensors(tensors, metadata={ENTRY: json.dumps(asdict(info))}))


def load_head(folder: Path) -> tuple[Head, HeadInfo]:
    """The head of a folder that `longlens finetune` made. Raises `CheckpointError` for anything else."""
    path = folder / FILE
    expected = f"{folder}: expected the folder of a finished `longlens finetune`"
    if not path.is_file():
        raise CheckpointError(f"{expected}, found no {FILE} in it")
    try:
        with safe_open(path, "pt") as file:
            entries = json.loads((file.metadata() or {}).get(ENTRY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{expected}; {FILE} cannot be read ({error})") from None
    if entries is None or "linear.weight" not in tensors:
        raise CheckpointError(f"{expected}, got another {FILE}")
    try:
        info = HeadInfo(**{**entries, "classes": tuple(entries["classes"])})
        outputs, width = tensors["linear.weight"].shape
        head = Head(width, outputs, info.hidden)
        head.load_state_dict(tensors)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{expected}; the description and the tensors of {FILE} do not fit each other ({error})"
        ) from None
    return head.eval().requires_grad_(False), info


def decide(targets: Targets, outputs: NDArray[np.float64], threshold: float | None) -> NDArray[np.float64]:
    """(R,): the number of the class of each row, by the threshold or the largest output; the values otherwise."""
    if not targets.task.classes:
        return outputs[:, 0]
    if threshold is not None:
        return (outputs[:, 1] >= threshold).astype(np.float64)
    return outputs.argmax(1).astype(np.float64)


def choose_threshold(targets: Targets, truth: NDArray[np.float64], outputs: NDArray[np.float64]) -> float | None:
    """The threshold of two classes with the best MCC; the one nearest to 0.5 among equals. None for other tasks."""
    if len(targets.classes) != 2:
        return None
    best: tuple[float, float] = (-2.0, 0.0)
    chosen = 0.5
    for threshold in _candidates(outputs[:, 1]):
        predicted = (outputs[:, 1] >= threshold).astype(np.int64)
        value = matthews(confusion(truth.astype(np.int64), predicted, 2, np.ones(len(truth))))
        rank = (round(value, 12), -abs(threshold - 0.5))
        if rank > best:
            best, chosen = rank, threshold
    return chosen


def _candidates(scores: NDArray[np.float64]) -> Sequence[float]:
    """0.5, and points halfway between scores."""
    values = np.unique(scores[np.isfinite(scores)])
    middles = (values[1:] + values[:-1]) / 2
    if len(middles) > TRIED:
        middles = np.quantile(middles, np.linspace(0, 1, TRIED))
    return [0.5, *middles.tolist()]
