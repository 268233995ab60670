"""The table of a job's proteins: names, lengths, what cleaning did, where the arrays lie, mean surprise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longlens.io.survey import Survey


def write_table(
    path: Path, survey: Survey, starts: NDArray[np.int64], arrays: Mapping[str, NDArray[Any]], file: str
) -> None:
    """One row for each record that was read, in order, then one for each skipped, with a `problem` and no `row`.

    `row` numbers the arrays by protein, `start` and `stop` those by residue. `surprise` is the mean over residues in
    nats, `perplexity` its exponential.
    """
    entries = survey.entries
    columns: dict[str, list[Any]] = {
        "source": [entry.source for entry in entries],
        "record": [entry.number for entry in entries],
        "id": [entry.id for entry in entries],
        "description": [entry.description for entry in entries],
        "length": [entry.length for entry in entries],
        "sha256": [entry.sha256 for entry in entries],
        "substituted": [entry.substituted for entry in entries],
        "gaps": [entry.gaps for entry in entries],
        "file": [file for _ in entries],
        "row": list(range(len(entries))),
        "start": starts[:-1].tolist(),
        "stop": starts[1:].tolist(),
        "problem": [None for _ in entries],
    }
    if "surprise" in arrays:
        sums = np.add.reduceat(arrays["surprise"].astype(np.float64), starts[:-1])
        means = sums / np.diff(starts)
        columns["surprise"] = means.tolist()
        columns["perplexity"] = np.exp(means).tolist()
    for record in survey.skipped:
        given = {"source": record.source, "record": record.number, "id": record.id, "problem": record.reason}
        for name, column in columns.items():
            column.append(given.get(name))
    pq.write_table(pa.table(columns), path)
