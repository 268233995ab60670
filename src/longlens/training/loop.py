"""The training loop: steps, schedule, validation, checkpoints and log."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from longlens.errors import CheckpointError, InputError
from longlens.io.alphabet import ESM
from longlens.io.results import lock, write_whole, writing
from longlens.models.encoder import EncoderConfig, attend_with
from longlens.models.language_model import MaskedLM
from longlens.training.checkpoints import (
    STABLE,
    CheckpointStep,
    Stateful,
    find_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from longlens.training.data import Crops, all_crops, crop_fits
from longlens.training.objective import held_out_perplexity, mask_tokens, masked_loss

LOG = "log.jsonl"
# what an error of the disk says is not lost
KEPT = "the last checkpoint stays"


@dataclass(frozen=True)
class TrainSettings:
    """The settings that decide the result of a run; `tokens` in a step, `crop` the longest crop, `decay` the share of
    steps in which the learning rate falls to 0."""

    layers: int = 6
    width: int = 256
    heads: int = 8
    steps: int = 2000
    tokens: int = 16_384
    crop: int = 2048
    joined: bool = False
    mask_rate: float = 0.15
    method: str = "exact"
    seed: int = 0
    rate: float = 0.02
    adam_rate: float = 0.003
    weight_decay: float = 0.05
    warmup: int = 50
    decay: float = 0.4
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, fits in (
            ("steps", self.steps >= 1),
            ("tokens", self.tokens >= 1),
            ("crop", crop_fits(self.crop, self.tokens)),
            ("warmup", self.warmup >= 0),
            ("rate", self.rate > 0),
            ("adam_rate", self.adam_rate > 0),
            ("mask_rate", 0 < self.mask_rate < 1),
            ("decay", 0 <= self.decay <= 1),
            ("layers", self.layers >= 1),
            # rotary positions turn pairs of numbers
            ("width", self.heads >= 1 and self.width >= 2 * self.heads and self.width % (2 * self.heads) == 0),
        ):
            if not fits:
                raise InputError(
                    "expected steps, tokens and layers of at least 1, a crop of 8 to all tokens of a step, rates above "
                    "0, a warmup of no negative number, mask_rate and decay as shares, a width of an even number for "
                    "each head, got "
                    f"{name} = {getattr(self, name)}"
                )

    def config(self) -> EncoderConfig:
        """The model's."""
        return EncoderConfig(len(ESM), self.layers, self.width, self.heads, feed_forward=4 * self.width)


@dataclass(frozen=True)
class TrainingReport:
    """The report of a step: loss in nats per masked residue, residues per second since the last report."""

    step: int
    steps: int
    loss: float
    rate: float
    held_out: float | None = None


def train(
    settings: TrainSettings,
    proteins: Sequence[NDArray[np.int16]],
    held_out: Sequence[NDArray[np.int16]],
    folder: Path,
    report: Callable[[TrainingReport], None],
    *,
    every: int = 100,
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[MaskedLM, int]:
    """Train to the last step, from the folder's checkpoint if there is one; returns the model and the step reached.

    Every `every` steps: held-out perplexity, a line in log.jsonl, a checkpoint. `stop` is asked after each step; a run
    that it ends is continued by the same call. With more steps than before, the run continues from where its learning
    rate began to fall, and gives the same as one that had so many from its beginning; `note` says so.

    Raises `CheckpointError` where the folder's run has other settings, or cannot become one of so many steps, and
    `InputError` if the folder cannot be written or another process trains in it.
    """
    if every < 1:
        raise InputError(f"expected at least 1 step between checkpoints, got {every}")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        locked = lock(folder / ".lock", folder)
    with locked:
        return _train(settings, proteins, held_out, folder, report, every=every, stop=stop, note=note)


def _train(
    settings: TrainSettings,
    proteins: Sequence[NDArray[np.int16]],
    held_out: Sequence[NDArray[np.int16]],
    folder: Path,
    report: Callable[[TrainingReport], None],
    *,
    every: int,
    stop: Callable[[], bool],
    note: Callable[[str], None],
) -> tuple[MaskedLM, int]:
    torch.manual_seed(settings.seed)
    # a contact head is fitted to structures, not trained here
    model = MaskedLM(settings.config(), ESM, contacts=False)
    model.initialise()
    attend = attend_with(settings.method)
    data = Crops(proteins, settings.crop, settings.tokens, settings.seed, joined=settings.joined)
    optimizers = _optimizers(model, settings)
    schedules = [LambdaLR(optimizer, lambda step: _schedule(step, settings)) for optimizer in optimizers]
    parts: dict[str, Stateful] = {"model": model, "data": data, "muon": optimizers[0], "adam": optimizers[1],
             "muon rate": schedules[0], "adam rate": schedules[1]}  # fmt: skip
    # the number of steps may be raised later: see `_begin`
    run_key = {name: value for name, value in asdict(settings).items() if name != "steps"}
    run_key |= {"proteins": _digest(proteins), "held_out": _digest(held_out)}
    step = _begin(folder, settings, run_key, parts, note)
    validation = all_crops(held_out, settings.crop, settings.tokens, joined=settings.joined)
    total, hidden, since, residues = 0.0, 0, time.monotonic(), 0
    while step < settings.steps:
        # seeded for each step, so that a checkpoint need not contain the generator's state
        generator = torch.manual_seed((settings.seed << 32) + step)
        masked = mask_tokens(data.next_step(), model.alphabet, generator, settings.mask_rate)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            loss = masked_loss(model, masked, attend)
        (loss / max(1, len(masked.truth))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        total, hidden, residues = total + loss.item(), hidden + len(masked.truth), residues + len(masked.packed.tokens)
        if step == stable_until(settings):
            with writing(folder, KEPT):
                write_checkpoint(folder, run_key, parts, CheckpointStep(step, settings.steps), STABLE)
        last = step == settings.steps
        leave = stop()
        rate = residues / (time.monotonic() - since)
        if step % every == 0 or last or leave:
            checked = step % every == 0 or last
            perplexity = held_out_perplexity(model, validation, attend) if checked else None
            progress = TrainingReport(step, settings.steps, total / max(1, hidden), rate, perplexity)
            with writing(folder, KEPT):
                # the line first: one that a killed run wrote without its checkpoint is written again and replaces it
                _append(folder, progress)
                write_checkpoint(folder, run_key, parts, CheckpointStep(step, settings.steps))
            report(progress)
            total, hidden, since, residues = 0.0, 0, time.monotonic(), 0
        elif step % 10 == 0:
            report(TrainingReport(step, settings.steps, total / max(1, hidden), rate))
        if leave:
            break
    model.source = str(folder)
    return model.eval(), step


def _begin(
    folder: Path,
    settings: TrainSettings,
    run_key: dict[str, Any],
    parts: dict[str, Stateful],
    note: Callable[[str], None],
) -> int:
    """Restore `parts` and return the step from which the run continues; 0 for a new run."""
    reached = find_checkpoint(folder)
    if reached is None:
        return 0
    before = replace(settings, steps=reached.steps or settings.steps)
    if before.steps == settings.steps or reached.step <= min(stable_until(before), stable_until(settings)):
        return read_checkpoint(folder, run_key, parts)
    stable = find_checkpoint(folder, STABLE)
    if stable is None or stable.step > stable_until(settings):
        raise CheckpointError(
            f"{folder} holds a run of {before.steps:,} steps that has reached step {reached.step:,}, past the point at "
            f"which the learning rate of one of {settings.steps:,} begins to fall (step {stable_until(settings):,}); "
            "give the same number of steps, more of them, or another folder"
        )
    step = read_checkpoint(folder, run_key, parts, STABLE)
    _drop_after(folder, step)
    note(f"the run had {before.steps:,} steps and is to have {settings.steps:,}: continuing from step {step:,}, where "
         "its learning rate began to fall")  # fmt: skip
    return step


def stable_until(settings: TrainSettings) -> int:
    """The last step before which the learning rate does not depend on the number of steps."""
    return int(settings.steps - settings.decay * settings.steps)


def _digest(proteins: Sequence[NDArray[np.int16]]) -> str:
    return hashlib.sha256(b"|".join(protein.tobytes() for protein in proteins)).hexdigest()


def _optimizers(model: MaskedLM, settings: TrainSettings) -> list[Optimizer]:
    """Muon for the layers' matrices (Jordan et al. 2024), AdamW for embedding, head, norms and biases."""
    matrices = [values for name, values in model.named_parameters() if values.ndim == 2 and ".layers." in name]
    others = [values for name, values in model.named_parameters() if values.ndim != 2 or ".layers." not in name]
    return [
        Muon(matrices, lr=settings.rate, weight_decay=settings.weight_decay, momentum=0.95),
        AdamW(others, lr=settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _schedule(step: int, settings: TrainSettings) -> float:
    """The factor of the learning rate: it rises, stays constant, and falls to 0 over the last steps."""
    rise = min(1.0, (step + 1) / max(1, settings.warmup))
    fall = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
    return max(0.0, min(rise, fall, 1.0))


def _drop_after(folder: Path, step: int) -> None:
    """Remove the lines of later steps from the log."""
    log = folder / LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    remaining = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_whole(log, "".join(f"{line}\n" for line in remaining).encode())


def _append(folder: Path, progress: TrainingReport) -> None:
    log = folder / LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    remaining = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < progress.step]
    write_whole(log, "".join(f"{line}\n" for line in [*remaining, json.dumps(asdict(progress))]).encode())
