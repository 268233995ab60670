"""The result object of `longlens.look`: the tables and figures of each sequence."""

from __future__ import annotations

import base64
import csv
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.stored import open_stored_npz, read_stored_table, undamaged
from longlens.jobs.table_results import TableResults
from longlens.report.arrow import ArrowTable
from longlens.report.coloured import coloured_html
from longlens.report.tables import to_frame


class Looks(ArrowTable, TableResults):
    """What a model attends to in each sequence, in a folder (`folder`) with a subfolder for each sequence.

    looks["P12345"]["rows"]["entropy"]          # a column of a table: layer x head x token
    looks.figures("P12345")                     # paths of the figures
    looks.to_frame("P12345", "tokens")          # pandas
    polars.DataFrame(looks)                     # the table `tokens` of all sequences, with their ids
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
                columns = read_stored_table(path)
                tables[path.stem] = {name: columns[name].to_numpy() for name in columns.column_names}
            elif path.suffix == ".npz":
                with undamaged(path), open_stored_npz(path) as arrays:
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

    def _arrow(self) -> Any:
        tables = []
        for number, id in enumerate(self.ids):
            table = read_stored_table(self.path(number) / "tokens.parquet").replace_schema_metadata()
            tables.append(table.add_column(0, "id", pa.array([id] * len(table), pa.string())))
        # sequences have the same columns, but for those that are empty in all of one sequence's tokens
        return pa.concat_tables(tables, promote_options="permissive")

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def _picture(self) -> str | None:
        """The first sequence: its tokens on the ground of their surprise, and the overview."""
        parts = []
        tokens = read_stored_table(self.path(0) / "tokens.parquet")
        if "surprise" in tokens.column_names:
            shown = tokens.filter(pc.invert(tokens["special"]))
            labels = shown["label"].to_pylist()
            parts.append(coloured_html(labels, shown["surprise"].to_numpy(), name=f"surprise in {self.ids[0]}"))
        for path in self.figures(0):
            if path.stem == "overview":
                data = base64.b64encode(path.read_bytes()).decode()
                parts.append(f'<img src="data:image/png;base64,{data}" alt="overview of the first sequence">')
        return "".join(parts) or None
