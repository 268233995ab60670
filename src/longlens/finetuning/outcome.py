"""What a fine-tuning found: every predictor's outputs for held-out proteins, measured, as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longlens.finetuning.metrics import Measured, measure_all
from longlens.finetuning.report import as_json, as_text, make_report
from longlens.finetuning.saved import choose_threshold, decide
from longlens.finetuning.splits import Leaks, Split
from longlens.finetuning.targets import Targets
from longlens.finetuning.trainer import loss_warning
from longlens.io.results import write_whole

REPORT, TEXT, PREDICTIONS = "report.json", "report.txt", "predictions.parquet"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """`outputs`: predictor -> number of a protein -> (1 or L, C) outputs, for validation and test proteins;
    `method` names the predictor that is kept; `stages` describes each stage, with its `log` of losses."""

    targets: Targets
    ids: Sequence[str]
    split: Split
    clusters: NDArray[np.int64]
    leaks: Mapping[str, Leaks]
    warnings: Sequence[str]
    method: str
    outputs: Mapping[str, Mapping[int, Floats]]
    stages: Mapping[str, Any]
    seed: int

    @cached_property
    def thresholds(self) -> dict[str, float | None]:
        """Each predictor's threshold, chosen on validation proteins, also that of a baseline."""
        validation, chosen = self.split.members("validation"), dict[str, float | None]()
        for name, outputs in self.outputs.items():
            truth, values, _ = self._rows(outputs, validation)
            chosen[name] = choose_threshold(self.targets, truth, values)
        return chosen

    def write(self, work: Path) -> tuple[dict[str, Any], list[Path]]:
        """The report, and the files of it and of the predictions, in `work`."""
        thresholds, test = self.thresholds, self.split.members("test")
        results: dict[str, dict[str, Measured]] = {}
        for name, outputs in self.outputs.items():
            truth, values, owners = self._rows(outputs, test)
            predicted = decide(self.targets, values, thresholds[name])
            results[name] = measure_all(self.targets, truth, values, predicted, self.clusters[owners], self.seed)
        diverged = [loss_warning(name, stage["log"]) for name, stage in self.stages.items() if "log" in stage]
        warnings = [*self.warnings, *filter(None, diverged)]
        report = make_report(self.targets, self.split, len(np.unique(self.clusters)), self.leaks, self.method, results,
                             self.stages, thresholds) | {"warnings": warnings}  # fmt: skip
        write_whole(work / REPORT, as_json(report))
        write_whole(work / TEXT, as_text(report, warnings).encode())
        pq.write_table(self._predictions(thresholds[self.method]), work / PREDICTIONS)
        return report, [work / REPORT, work / TEXT, work / PREDICTIONS]

    def _rows(self, outputs: Mapping[int, Floats], proteins: Sequence[int]) -> tuple[Floats, Floats, NDArray[np.int64]]:
        """Known targets (R,), outputs (R, C) and proteins (R,)."""
        truth = np.concatenate([self.targets.values[number] for number in proteins])
        owners = np.repeat(proteins, [len(self.targets.values[number]) for number in proteins])
        known = ~np.isnan(truth)
        return truth[known], np.concatenate([outputs[number] for number in proteins])[known], owners[known]

    def _predictions(self, threshold: float | None) -> pa.Table:
        """Held-out proteins (and residues, from 1): target, prediction, outputs of the kept predictor."""
        held_out = self.split.members("validation") + self.split.members("test")
        outputs = self.outputs[self.method]
        lengths = [len(outputs[number]) for number in held_out]
        values = np.concatenate([outputs[number] for number in held_out])
        truth = np.concatenate([self.targets.values[number] for number in held_out])
        columns: dict[str, Any] = {
            "id": np.repeat(np.array([self.ids[number] for number in held_out], object), lengths).tolist(),
            "set": np.repeat(np.array([self.split.sets[number] for number in held_out], object), lengths).tolist(),
        }
        if self.targets.task.by_residue:
            columns["position"] = np.concatenate([np.arange(1, length + 1) for length in lengths])
        columns["target"] = named(self.targets, truth)
        return pa.table(columns | prediction_columns(self.targets, values, threshold))


def named(targets: Targets, values: Floats) -> list[Any]:
    """Names of classes, or numbers; None where a target is not known."""
    if not targets.task.classes:
        return [None if np.isnan(value) else value for value in values.tolist()]
    return [None if np.isnan(value) else targets.classes[int(value)] for value in values]


def prediction_columns(targets: Targets, outputs: Floats, threshold: float | None) -> dict[str, Any]:
    """`predicted`, and for classes the probability of each in a column `p_NAME`."""
    columns: dict[str, Any] = {"predicted": named(targets, decide(targets, outputs, threshold))}
    for number, name in enumerate(targets.classes):
        columns[f"p_{name}"] = outputs[:, number].astype(np.float32)
    return columns
