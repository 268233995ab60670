"""Write what carried the predictions of one sequence: tables and figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longlens.jobs.context import TargetContext
from longlens.lens.deletion import Hideable
from longlens.report.context import draw_context, draw_curve
from longlens.report.figures import save

# why a stretch has no effect
UNDEFINED = "not defined: the query that predicts the target has no key left to attend to"


def write_context(
    folder: Path,
    subject: Hideable,
    contexts: Sequence[TargetContext],
    surprise: NDArray[np.float64] | None,
    curve: tuple[Sequence[int], Mapping[int, NDArray[np.float64]]] | None,
    *,
    name: str,
    draw: bool,
    about: Mapping[str, str],
) -> list[Path]:
    """Write targets.csv, spans.csv and keys.parquet; surprise.parquet where the targets were chosen by it; curve.csv
    and curve.parquet; and with `draw` context_TOKEN and curve as .png and .svg. `about` goes into the tables' metadata.
    """
    labels = subject.labels
    paths = [
        _csv(folder / "targets.csv", ["target", "token", "surprise"], (
            [context.target, labels[context.target], context.surprise] for context in contexts
        )),
        _csv(folder / "spans.csv", ["target", "start", "stop", "tokens", "halvings", "estimate", "exact", "note"], (
            [context.target, effect.span[0], effect.span[1] - 1, subject.text(effect.span), effect.halvings,
             effect.estimate, effect.exact, UNDEFINED if effect.undefined else ""]
            for context in contexts for effect in context.effects
        )),
    ]  # fmt: skip
    metadata = {"longlens": json.dumps(dict(about))}
    tokens, count = np.arange(len(labels)), len(contexts)
    paths.append(_parquet(folder / "keys.parquet", {
        "target": np.repeat([context.target for context in contexts], len(labels)).astype(np.int64),
        "key": np.tile(tokens, count), "token": list(labels) * count,
        "estimate": np.concatenate([context.keys for context in contexts]),
    }, metadata))  # fmt: skip
    if surprise is not None:
        columns = {"token": tokens, "label": list(labels), "surprise": surprise}
        paths.append(_parquet(folder / "surprise.parquet", columns, metadata))
    if curve is not None:
        paths += _write_curve(folder, labels, *curve, metadata)
    if draw:
        for context in contexts:
            effects = context.effects
            figure = draw_context(
                context.keys, labels, context.target, [effect.span for effect in effects],
                [effect.exact for effect in effects], [effect.estimate for effect in effects],
                title=f"{labels[context.target].strip()} at {context.target} of {name}", surprise=context.surprise,
            )  # fmt: skip
            paths += save(figure, folder, f"context_{context.target}")
        if curve is not None and len(curve[1]) > 1:
            paths += save(draw_curve(list(curve[1]), np.stack(list(curve[1].values())), title=name), folder, "curve")
    return paths


def _write_curve(
    folder: Path, labels: Sequence[str], targets: Sequence[int], curve: Mapping[int, NDArray[np.float64]],
    metadata: dict[str, str],
) -> list[Path]:  # fmt: skip
    rows: list[list[float]] = []
    before: NDArray[np.float64] | None = None
    for length, surprise in curve.items():
        gain = None if before is None else before - surprise
        rows.append([length, len(surprise), *_mean(surprise), *_mean(gain)])
        before = surprise
    header = ["context", "tokens", "surprise", "surprise_error", "gain", "gain_error"]
    table = {
        "context": np.repeat(list(curve), len(targets)).astype(np.int64),
        "token": np.tile(np.array(targets, np.int64), len(curve)),
        "label": [labels[target] for target in targets] * len(curve),
        "surprise": np.concatenate(list(curve.values())),
    }
    return [_csv(folder / "curve.csv", header, rows), _parquet(folder / "curve.parquet", table, metadata)]


def _mean(values: NDArray[np.float64] | None) -> tuple[float, float]:
    """The mean and its standard error."""
    if values is None:
        return float("nan"), float("nan")
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return float(values.mean()), error


def _csv(path: Path, header: Sequence[str], rows: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([_cell(value) for value in row])
    return path


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if np.isnan(value) else f"{value:.6f}"


def _parquet(path: Path, columns: Mapping[str, Any], metadata: dict[str, str]) -> Path:
    pq.write_table(pa.table(dict(columns)).replace_schema_metadata(metadata), path)
    return path
