"""The training loop: steps, schedule, validation, checkpoints, and a log of all of it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from longlens.errors import InputError
from longlens.io.alphabet import ESM
from longlens.io.results import write_whole
from longlens.models.encoder import Attend, EncoderConfig, Packed, attend_with, pack
from longlens.models.language_model import MaskedLM
from longlens.training.checkpoints import read_checkpoint, write_checkpoint
from longlens.training.data import Crops
from longlens.training.objective import mask_tokens, masked_loss

LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainSettings:
    """What decides a run's result; `tokens` in a step, `crop` the longest crop, `decay` the share of steps in which
    the learning rate falls to 0."""

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
            ("mask_rate", 0 < self.mask_rate < 1),
            ("decay", 0 <= self.decay <= 1),
            ("layers", self.layers >= 1),
            # rotary positions turn pairs of numbers
            ("width", self.heads >= 1 and self.width % (2 * self.heads) == 0),
        ):
            if not fits:
                raise InputError(f"expected steps and layers of at least 1, mask_rate and decay as shares, a width of "
                                 f"an even number for each head, got {name} = {getattr(self, name)}")  # fmt: skip

    def config(self) -> EncoderConfig:
        """The model's."""
        return EncoderConfig(
            vocabulary=len(ESM),
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            feed_forward=4 * self.width,
        )


@dataclass(frozen=True)
class Progress:
    """What a step reports: loss in nats per hidden residue, residues per second since the last report."""

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
    report: Callable[[Progress], None],
    *,
    every: int = 100,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[MaskedLM, int]:
    """Train to the last step, from the folder's checkpoint if there is one; the model, and the step it has reached.

    Every `every` steps: held-out perplexity, a line in log.jsonl, a checkpoint. `stop` is asked after each step; a run
    that it ends is gone on with by the same call.
    """
    torch.manual_seed(settings.seed)
    # a contact head is fitted to structures, not trained here
    model = MaskedLM(settings.config(), ESM, contacts=False)
    _initialise(model)
    attend = attend_with(settings.method)
    data = Crops(proteins, settings.crop, settings.tokens, settings.seed, joined=settings.joined)
    optimizers = _optimizers(model, settings)
    schedules = [LambdaLR(optimizer, lambda step: _schedule(step, settings)) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(settings.seed)
    # the number of steps may be raised later
    identity = {name: value for name, value in asdict(settings).items() if name != "steps"}
    identity |= {"proteins": _digest(proteins), "held_out": _digest(held_out)}
    state = read_checkpoint(folder, identity)
    step = 0
    if state is not None:
        step = state["step"]
        model.load_state_dict(state["model"])
        data.restore(state["data"])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        for optimizer, schedule, *saved in zip(
            optimizers, schedules, state["optimizers"], state["schedules"], strict=True
        ):
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
    held = validation_steps(held_out, settings)
    total, hidden, since, residues = 0.0, 0, time.monotonic(), 0
    while step < settings.steps:
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
        last = step == settings.steps
        leave = stop()
        now = time.monotonic()
        if step % every == 0 or last or leave:
            checked = step % every == 0 or last
            perplexity = held_out_perplexity(model, held, attend) if checked else None
            progress = Progress(step, settings.steps, total / max(1, hidden), residues / (now - since), perplexity)
            # the line first: one that a killed run wrote without its checkpoint is written again and replaces it
            _append(folder, progress)
            _write(folder, identity, step, model, optimizers, schedules, data, generator)
            report(progress)
            total, hidden, since, residues = 0.0, 0, time.monotonic(), 0
        elif step % 10 == 0:
            report(Progress(step, settings.steps, total / max(1, hidden), residues / (now - since)))
        if leave:
            break
    model.source = str(folder)
    return model.eval(), step


def validation_steps(held_out: Sequence[NDArray[np.int16]], settings: TrainSettings) -> list[Packed]:
    """All held-out proteins, cut into crops as in training, in order."""
    parts = [np.concatenate(list(held_out))] if settings.joined else list(held_out)
    crops = [part[start : start + settings.crop] for part in parts for start in range(0, len(part), settings.crop)]
    return list(_packs([crop.astype(np.int64) for crop in crops], settings.tokens))


def held_out_perplexity(model: MaskedLM, held: Sequence[Packed], attend: Attend | None = None, seed: int = 0) -> float:
    """exp of the mean negative log-likelihood over masked residues, 15 % of all, which `seed` chooses; in float32."""
    generator = torch.Generator().manual_seed(seed)
    total, count = 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for packed in held:
            masked = mask_tokens(packed, model.alphabet, generator, all_masked=True)
            total += masked_loss(model, masked, attend).item()
            count += len(masked.truth)
    model.train(training)
    return math.exp(total / max(1, count))


def _digest(proteins: Sequence[NDArray[np.int16]]) -> str:
    digest = hashlib.sha256()
    for protein in proteins:
        digest.update(protein.tobytes() + b"|")
    return digest.hexdigest()


def _packs(crops: Sequence[NDArray[np.int64]], tokens: int) -> Iterator[Packed]:
    held: list[NDArray[np.int64]] = []
    for crop in crops:
        if held and sum(map(len, held)) + len(crop) > tokens:
            yield pack(held)
            held = []
        held.append(crop)
    if held:
        yield pack(held)


def _initialise(model: MaskedLM) -> None:
    """Normal weights of deviation 0.02, the blocks' last ones smaller by sqrt(2 L) (Radford et al. 2019, 2.3)."""
    deep = (2 * model.config.layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            last = name.endswith(("out.weight", "down.weight"))
            torch.nn.init.normal_(parameter, std=0.02 * (deep if last else 1.0))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)


def _optimizers(model: MaskedLM, settings: TrainSettings) -> list[Optimizer]:
    """Muon for the layers' matrices (Jordan et al. 2024), AdamW for embedding, head, norms and biases."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return [
        Muon(matrices, lr=settings.rate, weight_decay=settings.weight_decay, momentum=0.95),
        AdamW(others, lr=settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _schedule(step: int, settings: TrainSettings) -> float:
    """Rise, hold, and fall to 0 over the last steps."""
    rise = min(1.0, (step + 1) / max(1, settings.warmup))
    fall = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
    return max(0.0, min(rise, fall, 1.0))


def _write(
    folder: Path,
    settings: dict[str, Any],
    step: int,
    model: MaskedLM,
    optimizers: list[Optimizer],
    schedules: list[LambdaLR],
    data: Crops,
    generator: torch.Generator,
) -> None:
    state = {
        "settings": settings,
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "schedules": [schedule.state_dict() for schedule in schedules],
        "data": data.state(),
        "generator": generator.get_state(),
        "rng": torch.get_rng_state(),
    }
    write_checkpoint(folder, state)


def _append(folder: Path, progress: Progress) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < progress.step]
    write_whole(log, "".join(f"{line}\n" for line in [*kept, json.dumps(asdict(progress))]).encode())
