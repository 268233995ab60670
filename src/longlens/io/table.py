"""The table of a job's proteins: names, lengths, what cleaning did, rows in the arrays, mean surprise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longlens.io.accessions import accession_of
from longlens.io.survey import Survey


def write_table(
    path: Path,
    survey: Survey,
    starts: NDArray[np.int64],
    arrays: Mapping[str, NDArray[Any]],
    file: str,
    about: Mapping[str, str],
    more: Mapping[str, list[Any]] | None = None,
) -> None:
    """One row for each record that was read, in order, then one for each skipped, with a `problem` and no `row`.

    `row` numbers the arrays by protein, `start` and `stop` those by residue. `surprise` is the mean over residues in
    nats, `perplexity` its exponential. `more`: further columns of the proteins that were read.
    """
    columns = survey_columns(survey) | {
        "file": [file] * len(survey.entries),
        "row": list(range(len(survey.entries))),
        "start": starts[:-1].tolist(),
        "stop": starts[1:].tolist(),
        **(more or {}),
    }
    if "surprise" in arrays:
        # between the chains of a complex there is none
        surprise = arrays["surprise"].astype(np.float64)
        there = ~np.isnan(surprise)
        sums = np.add.reduceat(np.where(there, surprise, 0.0), starts[:-1])
        means = sums / np.add.reduceat(there, starts[:-1], dtype=np.int64)
        columns |= {"surprise": means.tolist(), "perplexity": np.exp(means).tolist()}
    write_columns(path, survey, columns, about)


def survey_columns(survey: Survey) -> dict[str, list[Any]]:
    """The columns that the survey gives for each protein; `accession` is UniProt's, where the id holds one."""
    names = ("source", "number", "id", "accession", "description", "length", "sha256", "substituted", "gaps")
    columns = {
        name: [accession_of(entry.id) if name == "accession" else getattr(entry, name) for entry in survey.entries]
        for name in names
    }
    return {"record" if name == "number" else name: column for name, column in columns.items()}


def write_columns(path: Path, survey: Survey, columns: dict[str, list[Any]], about: Mapping[str, str]) -> None:
    """A table of the proteins' columns, with `problem`, and a row for each skipped record.

    Types do not depend on the values: `problem` is a column of text even if it is empty, and pandas reads whole
    numbers as whole numbers even if some are missing. `about` (the model, versions) goes to the schema's metadata.
    """
    columns = columns | {"problem": [None for _ in survey.entries]}
    for record in survey.skipped:
        cells = {
            "source": record.source, "record": record.number, "id": record.id, "accession": accession_of(record.id),
            "problem": record.reason,
        }  # fmt: skip
        for name, column in columns.items():
            column.append(cells.get(name))
    schema = pa.schema([(name, _TYPES.get(name, pa.int64())) for name in columns])
    metadata = {"longlens": json.dumps(dict(about)), "pandas": json.dumps(_for_pandas(schema))}
    pq.write_table(pa.table(columns, schema=schema.with_metadata(metadata)), path)


_TYPES = dict.fromkeys(
    ("source", "id", "accession", "description", "sha256", "file", "dataset", "form", "problem"), pa.string()
) | dict.fromkeys(("surprise", "perplexity"), pa.float64())


def _for_pandas(schema: pa.Schema) -> dict[str, Any]:
    """Metadata that makes pandas read a column of whole numbers with missing values as Int64, not float."""
    kinds = {pa.string(): ("unicode", "object"), pa.float64(): ("float64", "float64"), pa.int64(): ("int64", "Int64")}
    columns = [
        {"name": field.name, "field_name": field.name, "pandas_type": kinds[field.type][0],
         "numpy_type": kinds[field.type][1], "metadata": None}
        for field in schema
    ]  # fmt: skip
    return {"index_columns": [], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0",
            "creator": {"library": "pyarrow", "version": pa.__version__}}  # fmt: skip
