"""Scores by several models, one after the other, and their mean (ESM-1v is five: Meier et al. 2021)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

import numpy as np

from longlens.io.delimited import write_delimited
from longlens.io.results import MANIFEST, as_json, read_manifest, write_whole, writing
from longlens.jobs.output import output_folder
from longlens.jobs.progress import ProgressCallback
from longlens.jobs.runner import Job, run
from longlens.jobs.variant_table import PROBLEM, VariantTable

MEAN = "mean"
M = TypeVar("M")


def run_models(
    models: Sequence[M],
    make: Callable[[M], Job],
    file: str,
    output: Path | None,
    progress: ProgressCallback,
    combine: Callable[[list[str], list[str]], str],
) -> tuple[str, dict[str, Any]]:
    """Run the job of each model, and write what `combine` makes of their files and names; returns it and the manifest.

    `make` loads a model and returns its job, which makes `file`; one model is in memory at a time. A hidden folder
    beside the output keeps each model's results, so that after an interruption the same call continues.
    """
    texts, manifests = [], []
    with _work_folder(output) as folder:
        for number, model in enumerate(models, 1):
            path = folder / f"{number}"
            run(make(model), path, progress)
            texts.append((path / file).read_bytes().decode())
            manifests.append(read_manifest(path))
        names = _distinct([manifest["model"]["name"] for manifest in manifests])
        text = combine(texts, names)
        manifest = manifests[0] | {
            "model": manifests[0]["model"] | {"name": f"{MEAN} of {', '.join(names)}"},
            "models": [manifest["model"] for manifest in manifests],
            "keys": [manifest["job"] for manifest in manifests],
        }
        if output is not None:
            manifest["files"] = {output.name: len(text.encode())}
            with writing(output):
                write_whole(output.with_name(f"{output.name}.{MANIFEST}"), as_json(manifest))
                write_whole(output, text.encode())
                rmtree(folder)
    return text, manifest


@contextmanager
def _work_folder(output: Path | None) -> Iterator[Path]:
    if output is not None:
        path = output.with_name(f".{output.name}.longlens-models")
        with writing(output):
            path.mkdir(exist_ok=True)
        yield path
        return
    with output_folder(None) as folder:
        yield folder.path
        folder.discard()


def _distinct(names: list[str]) -> list[str]:
    """Names of models, numbered where two are the same."""
    return [
        name if names.count(name) == 1 else f"{name}_{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]


def mean_column(table: VariantTable, strategy: str) -> str:
    """The name of the column of means. Raises `SequenceError` if it is taken."""
    return table.new_column(MEAN, strategy)


def combine_variants(table: VariantTable, strategy: str, columns: list[str], texts: list[str], names: list[str]) -> str:
    """The table with a column for each model and one of their means. `columns`: of the scores in `texts`."""
    scores = []
    for text, column in zip(texts, columns, strict=True):
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=table.table.delimiter)
        scores.append([row[column] for row in rows])
    cells: dict[str, Sequence[str]] = {
        table.new_column(name, strategy): column for name, column in zip(names, scores, strict=True)
    }
    cells[mean_column(table, strategy)] = [
        "" if "" in row else f"{np.mean([float(cell) for cell in row]):.6f}" for row in zip(*scores, strict=True)
    ]
    if table.problems is not None:
        cells[PROBLEM] = table.problems
    return write_delimited(table.table, cells)


def combine_substitutions(texts: list[str], names: list[str]) -> str:
    """The mean of the matrices of all substitutions, in the form of each."""
    tables = [list(csv.reader(io.StringIO(text, newline=""))) for text in texts]
    mean = np.mean([np.array([row[2:] for row in table[1:]], np.float64) for table in tables], 0)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(tables[0][0])
    writer.writerows(
        [*row[:2], *(f"{value:.6f}" for value in line)] for row, line in zip(tables[0][1:], mean, strict=True)
    )
    return out.getvalue()
