"""Training a head, or a head and adapters, by steps of whole proteins; the best step on validation proteins is kept.

A `Stage` is trained a round of steps at a time. Its state after a round is a file from which the next round continues
with the same numbers, whether the process was stopped between or not.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from longlens.errors import InputError
from longlens.io.results import write_whole

# most of the gradients' norm; larger ones are scaled down
CLIP = 1.0


@dataclass(frozen=True)
class TuneSettings:
    """The settings of training. `steps`: the most; `every`: steps between validations; `patience`: validations without
    improvement after which a stage ends; `tokens` in a step; `hidden`: width of the head's inner layer."""

    steps: int = 400
    every: int = 20
    patience: int = 5
    tokens: int = 4096
    head_rate: float = 1e-3
    rate: float = 1e-3
    rank: int = 8
    alpha: float = 16.0
    hidden: int = 64
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "every", "patience", "tokens", "rank", "hidden"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"expected {name} as a whole number of at least 1, got {value!r}")
        for name in ("head_rate", "rate", "alpha"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"expected {name} above 0, got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"expected weight_decay of at least 0, got {self.weight_decay!r}")
        # a step's own seed has these 32 bits and those of its number
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise InputError(f"expected a seed as a whole number from 0 to {2**32 - 1}, got {self.seed!r}")

    @property
    def rounds(self) -> int:
        """Rounds of `every` steps."""
        return -(-self.steps // self.every)


# each protein's loss (P,), with gradients, of the proteins with these numbers
Losses = Callable[[Sequence[int]], Tensor]


@dataclass
class Stage:
    """What is trained (`parameters`, by name), on which proteins, and the losses of proteins.

    `active` puts the model into the form in which it is trained.
    """

    parameters: Mapping[str, nn.Parameter]
    losses: Losses
    training: Sequence[int]
    validation: Sequence[int]
    lengths: Sequence[int]
    settings: TuneSettings
    rate: Mapping[str, float]
    module: nn.Module
    active: Callable[[], AbstractContextManager[Any]]

    def first_state(self) -> dict[str, Any]:
        """The state before any step, with the loss of validation proteins."""
        values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        loss = self.validation_loss()
        return {"step": 0, "epoch": 0, "place": 0, "values": values, "best": values, "best_step": 0, "best_loss": loss,
                "optimizer": None, "stale": 0, "log": [[0, None, loss]]}  # fmt: skip

    def train_round(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state after a further round; the same state where training has ended."""
        settings = self.settings
        if self.ended(state):
            return state
        self.restore(state["values"])
        optimizer = self._optimizer(state["optimizer"])
        order, batches = -1, list[list[int]]()
        epoch, place, step, total = state["epoch"], state["place"], state["step"], 0.0
        stop = min(step + settings.every, settings.steps)
        count = stop - step
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        while step < stop:
            if order != epoch:
                order, batches = epoch, self.batches(epoch)
            # seeded for each step, so that a state need not contain the generator's
            torch.manual_seed((settings.seed << 32) + step)
            total += self._step(optimizer, batches[place], len(batches))
            step, place = step + 1, place + 1
            if place == len(batches):
                epoch, place = epoch + 1, 0
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        loss = self.validation_loss()
        # any number is better than none: a comparison with NaN is never true
        better = math.isfinite(loss) and not loss >= state["best_loss"]
        return {
            "step": step, "epoch": epoch, "place": place, "values": values, "optimizer": optimizer.state_dict(),
            "best": values if better else state["best"], "best_step": step if better else state["best_step"],
            "best_loss": loss if better else state["best_loss"], "stale": 0 if better else state["stale"] + 1,
            "log": [*state["log"], [step, total / count, loss]],
        }  # fmt: skip

    def ended(self, state: dict[str, Any]) -> bool:
        """Whether the last step is reached, or too many rounds brought nothing."""
        return state["step"] >= self.settings.steps or state["stale"] >= self.settings.patience

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Set the parameters."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def batches(self, epoch: int) -> list[list[int]]:
        """The steps of an epoch: training proteins in random order, as many as fit into `tokens`; a longer protein is
        alone. They are not sorted by length: packed, they need no padding, and a step of like lengths is biased."""
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.training))
        steps: list[list[int]] = []
        room = 0
        for place in order.tolist():
            protein = self.training[place]
            need = self.lengths[protein] + 2
            if not steps or need > room:
                steps.append([])
                room = self.settings.tokens
            steps[-1].append(protein)
            room -= need
        return steps

    def validation_loss(self) -> float:
        """The mean loss of validation proteins, each counted once."""
        self.module.eval()
        total, batch, tokens = 0.0, list[int](), 0
        with torch.no_grad(), self.active():
            for protein in [*self.validation, -1]:
                need = self.lengths[protein] + 2 if protein >= 0 else self.settings.tokens + 1
                if batch and tokens + need > self.settings.tokens:
                    total += float(self.losses(batch).double().sum())
                    batch, tokens = [], 0
                batch.append(protein)
                tokens += need
        return total / len(self.validation)

    def _step(self, optimizer: AdamW, proteins: Sequence[int], steps: int) -> float:
        """One step; returns the mean loss of its proteins. The sum is divided by the mean number of proteins in a
        step, so that every protein counts the same, whatever it is packed with."""
        self.module.train()
        with torch.enable_grad(), self.active():
            losses = self.losses(proteins)
            (losses.sum() * (steps / len(self.training))).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(losses.detach().mean())

    def _optimizer(self, state: dict[str, Any] | None) -> AdamW:
        groups = [
            {"params": [parameter], "lr": self.rate[name]} for name, parameter in self.parameters.items()
        ]  # fmt: skip
        optimizer = AdamW(groups, weight_decay=self.settings.weight_decay)
        if state is not None:
            optimizer.load_state_dict(state)
        return optimizer


def loss_warning(name: str, log: Sequence[Sequence[float | None]]) -> str:
    """A warning of the first loss of a stage that is not finite, by its `log`; empty where all are finite."""
    for step, *losses in log:
        if not all(loss is None or math.isfinite(loss) for loss in losses):
            rates = "--head-rate" if name == "head" else "--rate or --head-rate"
            return (
                f"{name}: the loss at step {step} is not a finite number, so the best step with a finite loss is kept; "
                f"lower {rates}, or look for targets that are far from all others"
            )
    return ""


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state whole."""
    file = io.BytesIO()
    torch.save(state, file)
    write_whole(path, file.getvalue())


def read_state(path: Path) -> dict[str, Any]:
    """The state of a file."""
    return torch.load(path, map_location="cpu", weights_only=True)
