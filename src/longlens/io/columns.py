"""Tables of columns as files: CSV, TSV, Parquet or JSON; the same columns give the same bytes.

A missing number (NaN) is an empty cell, and null in JSON. Parquet keeps what `about` says in its metadata, JSON beside
the columns; CSV and TSV have no place for it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlens.errors import InputError

FORMATS = ("csv", "tsv", "parquet", "json")
# the only column of texts in tables of numbers by token, word or line
TEXT = "text"
# digits of a number in a text file: those of float32
DIGITS = 9

Columns = Mapping[str, Sequence[Any]]
"""Columns of equal length: texts, whole numbers, or numbers."""


def format_of(path: str | Path | None, chosen: str | None = None) -> str:
    """The format that `chosen` names, or else the path's suffix; CSV without either.

    Raises `InputError` for a suffix that is no format, or one that differs from `chosen`.
    """
    if chosen is not None and chosen not in FORMATS:
        raise InputError(f"expected a format of {', '.join(FORMATS)}, got {chosen!r}")
    suffix = "" if path is None else Path(path).suffix.removeprefix(".").lower()
    if chosen is None and path is not None and suffix not in FORMATS:
        raise InputError(f"expected an output that ends in .csv, .tsv, .parquet or .json, got {path}")
    if chosen is not None and suffix in FORMATS and suffix != chosen:
        raise InputError(f"expected an output that ends in .{chosen}, got {path}; leave out the format")
    return chosen or suffix or "csv"


def columns_as(columns: Columns, format: str, about: Mapping[str, Any]) -> bytes:
    """The content of a file in a format of `FORMATS`."""
    if format == "parquet":
        return _parquet(columns, about)
    if format == "json":
        plain = {name: [_plain(value) for value in column] for name, column in columns.items()}
        return (json.dumps({"about": dict(about), "columns": plain}, ensure_ascii=False, indent=1) + "\n").encode()
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if format == "tsv" else ",", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*([_cell(value) for value in column] for column in columns.values()), strict=True))
    return text.getvalue().encode()


def columns_from(data: bytes, format: str) -> dict[str, list[Any]]:
    """The columns of `columns_as`: texts, whole numbers and numbers as they were, up to the digits of the file.

    JSON has no word for an infinite number: "inf" and "-inf" are numbers in a column of numbers.
    """
    if format == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(pa.BufferReader(data))
        return {name: [_number(value) for value in table[name].to_pylist()] for name in table.column_names}
    if format == "json":
        read = json.loads(data)["columns"]
        return {name: _from_json(name, column) for name, column in read.items()}
    rows = list(csv.reader(io.StringIO(data.decode(), newline=""), delimiter="\t" if format == "tsv" else ","))
    names, cells = rows[0], rows[1:]
    return {name: _typed(name, [row[place] for row in cells]) for place, name in enumerate(names)}


def _parquet(columns: Columns, about: Mapping[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {}
    for name, column in columns.items():
        values = np.asarray(column) if not _is_text(column) else None
        missing = None if values is None or values.dtype.kind != "f" else np.isnan(values)
        arrays[name] = pa.array(list(column), pa.string()) if values is None else pa.array(values, mask=missing)
    table = pa.table(arrays).replace_schema_metadata({"longlens": json.dumps(dict(about))})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def _is_text(column: Sequence[Any]) -> bool:
    return len(column) > 0 and isinstance(column[0], str)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float | np.floating):
        return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None if np.isnan(value) else str(value)
    return int(value)


def _cell(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{value:.{DIGITS}g}"
    return str(value)


def _number(value: Any) -> Any:
    return float("nan") if value is None else value


def _from_json(name: str, column: list[Any]) -> list[Any]:
    texts = {value for value in column if isinstance(value, str)}
    # a token may read "inf"
    if name == TEXT or not texts <= {"inf", "-inf"}:
        return [_number(value) for value in column]
    return [float(value) if isinstance(value, str) else _number(value) for value in column]


def _typed(name: str, cells: list[str]) -> list[Any]:
    if name == TEXT:
        return list(cells)
    try:
        return [int(cell) for cell in cells]
    except ValueError:
        return [float(cell or "nan") for cell in cells]
