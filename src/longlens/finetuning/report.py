"""The report of a fine-tuning: JSON for programs, a table for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from longlens.finetuning.metrics import Measured
from longlens.finetuning.splits import BOUNDS, SETS, Leaks, Split
from longlens.finetuning.targets import Targets
from longlens.io.results import plain_json


def make_report(
    targets: Targets, split: Split, clusters: int, leaks: Mapping[str, Leaks], method: str,
    results: Mapping[str, Mapping[str, Measured]], stages: Mapping[str, Any], thresholds: Mapping[str, float | None],
) -> dict[str, Any]:  # fmt: skip
    """Everything that was measured, as plain JSON. Measures are those of the test set."""
    return {
        "task": targets.task.name,
        "method": method,
        "classes": list(targets.classes),
        "split": {"kind": split.kind, "clusters": clusters, **{name: len(split.members(name)) for name in SETS}},
        "nearest_training_identity": {
            name: {"bounds": list(BOUNDS), "counts": list(found.counts), "alike": found.alike,
                   "near_twins": found.near_twins} for name, found in leaks.items()
        },
        "test": {
            name: {measure: {"value": _number(found.value), "low": _number(found.low), "high": _number(found.high)}
                   for measure, found in measured.items()} for name, measured in results.items()
        },
        "stages": plain_json(stages),
        "thresholds": {name: value for name, value in thresholds.items() if value is not None},
    }  # fmt: skip


def _number(value: float | None) -> float | None:
    """Six digits; None for what is not finite, which JSON has no number for."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def as_text(report: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """The report as a table: a row for each predictor, a column for each measure with its 95 % interval."""
    split = report["split"]
    lines = [
        f"task        {report['task']}" + (f" ({', '.join(report['classes'])})" if report["classes"] else ""),
        f"split       {split['kind']}: {split['train']:,} train, {split['validation']:,} validation, "
        f"{split['test']:,} test; {split['clusters']:,} clusters",
    ]
    threshold = report["thresholds"].get(report["method"])
    if threshold is not None:
        lines.append(
            f"looked for  {report['classes'][1]}, the rarer class (pr_auc is its), predicted where its probability is "
            f"{threshold:.3f} or more"
        )
    measures = list(next(iter(report["test"].values())))
    lines += ["", "test set, with 95 % intervals over clusters", ""]
    rows = [["", *measures]] + [
        [name, *(_cell(found[measure]) for measure in measures)] for name, found in report["test"].items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    trained = [(name, stage) for name, stage in report["stages"].items() if "best_step" in stage]
    lines += [""] if trained else []
    lines += [
        f"{name}: best step {stage['best_step']:,} of {stage['steps']:,}, validation loss "
        f"{_loss(stage['first_loss'])} before, {_loss(stage['best_loss'])} at the best step"
        for name, stage in trained
    ]
    lines += [f"warning: {note}" for note in notes]
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, float | None]) -> str:
    if found["value"] is None:
        return "-"
    interval = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return f"{found['value']:.3f}{interval}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def as_json(report: Mapping[str, Any]) -> bytes:
    """The report's file."""
    return (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()
