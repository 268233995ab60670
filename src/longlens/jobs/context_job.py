"""The job that measures what carried predictions: `longlens.context` and `longlens context`."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from longlens.io.results import ResultFolder, write_whole
from longlens.jobs.context import (
    ContextOptions,
    SpanEffect,
    TargetContext,
    context_curve,
    curve_targets,
    most_surprising,
    predicted_passes,
    target_context,
)
from longlens.jobs.context_writers import write_context
from longlens.jobs.inputs import ProteinSource
from longlens.jobs.job_key import ModelInfo, job_key
from longlens.jobs.look import folder_name
from longlens.jobs.progress import StageProgress
from longlens.jobs.runner import Job, Unit, UnitMemory, described, file_notes
from longlens.lens.deletion import Hideable, Passes, Span
from longlens.models.language_model import MaskedLM

PASSES = "passes.csv"


@dataclass(frozen=True)
class SequencePlan:
    """What is done for one sequence. `targets`: None where they are chosen by their surprise, `count` of them."""

    targets: tuple[int, ...] | None
    count: int
    spans: tuple[Span, ...]
    predicted: Passes

    def units(self, *, curve: bool) -> list[str]:
        """Its units of work."""
        choosing = ["choose"] if self.targets is None else []
        return [*choosing, *(f"target {number}" for number in range(self.count)), *(["curve"] if curve else [])]


@dataclass
class ContextJob(Job):
    """A unit of work is one target of one sequence, or the surprise of all its tokens, or its curve.

    `subject` makes a sequence's `Hideable`; `need`: bytes that the longest sequence takes, of `limit`.
    """

    grad_mode: ClassVar[type[torch.inference_mode | torch.no_grad]] = torch.no_grad

    model: ModelInfo
    source: ProteinSource
    options: ContextOptions
    subject: Callable[[str], Hideable]
    plans: Sequence[SequencePlan]
    limit: int
    need: int

    @property
    def key(self) -> dict[str, Any]:
        # figures name the model, so its name belongs to the job key
        survey = self.source.survey
        records = [[entry.source, entry.number, entry.sha256] for entry in survey.entries]
        skipped = [[record.source, record.number] for record in survey.skipped]
        plans = [[plan.targets, plan.count, plan.spans] for plan in self.plans]
        chosen = self.options.described() | {"name": self.model.name, "plans": plans}
        return job_key(self.model, survey, chosen | {"records": records, "skipped": skipped})

    @property
    def about(self) -> dict[str, Any]:
        skipped = [
            {"id": record.id, "source": record.source, "number": record.number, "problem": record.reason}
            for record in self.source.survey.skipped
        ]
        return super().about | {"folders": self._names, "skipped": skipped}

    @property
    def _names(self) -> list[str]:
        entries = self.source.survey.entries
        width = len(str(max(entry.number for entry in entries)))
        return [folder_name(entry.id, entry.number, width) for entry in entries]

    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        smaller = "choose wider stretches (--spans), lower --tokens-per-batch, use --dtype bfloat16 or a smaller model"
        unit = "residues" if isinstance(self.model.module, MaskedLM) else "tokens"
        return UnitMemory(self.need, described(self.source.survey.longest, unit), smaller)

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        kinds = [plan.units(curve=self.options.curve > 0) for plan in self.plans]
        total, done = sum(map(len, kinds)), 0
        for place, names in enumerate(kinds):
            for number in range(len(names)):
                done += 1
                yield Unit(place, place + 1, StageProgress("context", done, total, "steps"), number, number + 1)

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Any]:
        plan, subject = self.plans[unit.first], self.subject(texts[0])
        name = plan.units(curve=self.options.curve > 0)[unit.start]
        if name == "choose":
            found = _surprise_of_all(subject)
        elif name == "curve":
            found = _curve_arrays(context_curve(subject, curve_targets(subject, self.options.curve)))
        else:
            target = self._targets(unit.first, folder)[int(name.split()[1])]
            found = _target_arrays(target_context(subject, target, plan.spans, self.options))
        passes = subject.passes
        counts = np.array([passes.forward, passes.backward, passes.pieces, passes.tokens], np.int64)
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, **found, passes=counts)
        write_whole(self._part(folder, unit.first, name), data.getvalue())
        return ()

    def finish(self, folder: ResultFolder) -> list[Path]:
        """Tables and figures of each sequence, from the parts that the units left."""
        used, names = [], self._names
        for place, (text, name) in enumerate(zip(self.source.sequences(), names, strict=True)):
            folder_path = folder.work / name
            # left by a run that was killed
            shutil.rmtree(folder_path, ignore_errors=True)
            folder_path.mkdir()
            used.append(self._write(place, text, folder, folder_path))
            folder.place(folder_path)
        passes = folder.work / PASSES
        write_whole(passes, self._passes(used))
        return [*(folder.path / name for name in names), folder.place(passes)]

    def _write(self, place: int, text: str, folder: ResultFolder, folder_path: Path) -> Passes:
        plan, subject, entry = self.plans[place], self.subject(text), self.source.survey.entries[place]
        kinds = plan.units(curve=self.options.curve > 0)
        parts = {kind: dict(np.load(self._part(folder, place, kind))) for kind in kinds}
        targets = self._targets(place, folder)
        contexts = [
            _target_of(target, parts[f"target {number}"]) for number, target in enumerate(targets[: plan.count])
        ]
        curve = None
        if "curve" in parts:
            curve = curve_targets(subject, self.options.curve), _curve_of(parts["curve"])
        surprise = parts["choose"]["surprise"] if "choose" in parts else None
        about = file_notes(self.model, folder) | {"id": entry.id, "length": str(entry.length)}
        write_context(
            folder_path, subject, contexts, surprise, curve, name=f"{entry.id or 'the sequence'}, "
            f"{self.model.name}", draw=self.options.figures, about=about,
        )  # fmt: skip
        counts = np.sum([part["passes"] for part in parts.values()], 0)
        return Passes(*map(int, counts))

    def _targets(self, place: int, folder: ResultFolder) -> Sequence[int]:
        plan = self.plans[place]
        if plan.targets is not None:
            return plan.targets
        surprise: NDArray[np.float64] = np.load(self._part(folder, place, "choose"))["surprise"]
        return most_surprising(surprise, plan.count)

    @staticmethod
    def _part(folder: ResultFolder, place: int, kind: str) -> Path:
        return folder.work / f"{place}_{kind.replace(' ', '_')}.npz"

    def _passes(self, used: Sequence[Passes]) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = ("forward", "backward", "pieces")
        writer.writerow(["id", *names, *(f"predicted_{name}" for name in names), "tokens"])
        for entry, passes, plan in zip(self.source.survey.entries, used, self.plans, strict=True):
            counts = [getattr(counted, name) for counted in (passes, plan.predicted) for name in names]
            writer.writerow([entry.id, *counts, passes.tokens])
        return text.getvalue().encode()


def plan_sequence(
    subject: Hideable, targets: Sequence[int] | None, spans: Sequence[Span], options: ContextOptions
) -> SequencePlan:
    """The plan of one sequence: its targets, where they are given, its stretches, and what it takes at most."""
    able = len(curve_targets(subject, len(subject.labels)))
    count = min(options.most, able) if targets is None else len(targets)
    predicted = predicted_passes(len(subject.labels), able, count, spans, options, causal=subject.causal)
    return SequencePlan(None if targets is None else tuple(targets), count, tuple(spans), predicted)


def _surprise_of_all(subject: Hideable) -> dict[str, NDArray[Any]]:
    places = curve_targets(subject, len(subject.labels))
    surprise = np.full(len(subject.labels), np.nan)
    surprise[places] = subject.surprise(places)
    return {"surprise": surprise}


def _target_arrays(context: TargetContext) -> dict[str, NDArray[Any]]:
    effects = context.effects
    return {
        "surprise": np.array(context.surprise),
        "keys": context.keys,
        "spans": np.array([effect.span for effect in effects], np.int64).reshape(-1, 2),
        "numbers": np.array([[effect.estimate, effect.exact] for effect in effects]).reshape(-1, 2),
        "halvings": np.array([effect.halvings for effect in effects], np.int64),
        "undefined": np.array([effect.undefined for effect in effects], bool),
    }


def _target_of(target: int, arrays: Mapping[str, NDArray[Any]]) -> TargetContext:
    effects = tuple(
        SpanEffect((int(start), int(stop)), float(estimate), float(exact), int(halvings), bool(undefined))
        for (start, stop), (estimate, exact), halvings, undefined in zip(
            arrays["spans"], arrays["numbers"], arrays["halvings"], arrays["undefined"], strict=True
        )
    )
    return TargetContext(target, float(arrays["surprise"]), arrays["keys"], effects)


def _curve_arrays(curve: Mapping[int, NDArray[np.float64]]) -> dict[str, NDArray[Any]]:
    return {"lengths": np.array(list(curve), np.int64), "surprise": np.stack(list(curve.values()))}


def _curve_of(arrays: Mapping[str, NDArray[Any]]) -> dict[int, NDArray[np.float64]]:
    return {int(length): row for length, row in zip(arrays["lengths"], arrays["surprise"], strict=True)}
