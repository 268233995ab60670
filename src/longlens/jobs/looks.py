"""The result object of `longlens.look`: the tables and figures of each sequence."""

from __future__ import annotations

import base64
import csv
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.jobs.table_results import TableResults
from longlens.report.tables import to_frame


class Looks(TableResults):
    """What a model attends to in each sequence, in a folder (`folder`) with a subfolder for each sequence.

    looks["P12345"]["rows"]["entropy"]          # a column of a table: layer x head x token
    looks.figures("P12345")                     # paths of the figures
    looks.to_frame("P12345", "tokens")          # pandas
    """

    kind = "attention"
    unit = "sequence"

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """A row for each sequence: its id, its length, its folder; skipped records come last and have a `problem`."""
        sequences = self.manifest["proteins"]
        return [
            {"id": name, "length": length, "folder": folder, "problem": None}
            for name, length, folder in zip(
                sequences["ids"], sequences["lengths"], self.manifest["folders"], strict=True
            )
        ] + [
            {"id": record["id"], "length": None, "folder": None, "problem": record["problem"]}
            for record in self.manifest.get("skipped", [])
        ]

    def __getitem__(self, sequence: str | int) -> dict[str, dict[str, NDArray[Any]]]:
        """Tables by name (overview, tokens, rows, top_keys, top_queries, pooled), each a dictionary of columns."""
        tables = {}
        for path in sorted(self.path(sequence).iterdir()):
            if path.suffix == ".parquet":
                columns = pq.read_table(path)
                tables[path.stem] = {name: columns[name].to_numpy() for name in columns.column_names}
            elif path.suffix == ".npz":
                with np.load(path) as arrays:
                    tables[path.stem] = {name: arrays[name] for name in arrays if not name.startswith("about/")}
            elif path.suffix == ".csv":
                with path.open(newline="", encoding="utf-8") as file:
                    header, *rows = list(csv.reader(file))
                tables[path.stem] = {
                    name: np.array([float(row[place]) for row in rows]) for place, name in enumerate(header)
                }
        return tables

    def path(self, sequence: str | int) -> Path:
        """The folder of a sequence."""
        return self.folder / self.row(sequence)["folder"]

    def figures(self, sequence: str | int) -> list[Path]:
        """The figures of a sequence, as .png files."""
        return sorted(self.path(sequence).glob("*.png"))

    def to_frame(self, sequence: str | int, name: str = "tokens") -> Any:
        """A pandas data frame of one table of a sequence. Needs the extra `notebook`."""
        tables = {table: columns for table, columns in self[sequence].items() if table != "pooled"}
        if name not in tables:
            raise InputError(f"expected a table of {', '.join(tables)}, got {name!r}")
        return to_frame(tables[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def _picture(self) -> str | None:
        shown = [path for path in self.figures(0) if path.stem == "overview"]
        if not shown:
            return None
        data = base64.b64encode(shown[0].read_bytes()).decode()
        return f'<img src="data:image/png;base64,{data}" alt="overview of the first sequence">'
