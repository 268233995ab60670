"""The result object of `longlens.context`: the tables and figures of each sequence."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.stored import read_stored_table
from longlens.jobs.table_results import TableResults
from longlens.report.tables import to_frame

# columns of the CSV tables that hold text
_TEXT = ("token", "tokens", "note")


class Contexts(TableResults):
    """What carried the predictions in each sequence, in a folder (`folder`) with a subfolder for each sequence.

    contexts["P12345"]["spans"]["exact"]        # a column of a table: targets x stretches
    contexts.to_frame("P12345", "spans")        # pandas
    contexts.passes                             # what it took, in passes of the model
    contexts.figures("P12345")                  # paths of the figures
    """

    kind = "context"
    unit = "sequence"

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """A row for each sequence: its id, its length, its folder, the passes it took; skipped records come last."""
        sequences, passes = self.manifest["proteins"], self.passes
        return [
            {"id": name, "length": length, "folder": folder, **passes[place], "problem": None}
            for place, (name, length, folder) in enumerate(
                zip(sequences["ids"], sequences["lengths"], self.manifest["folders"], strict=True)
            )
        ] + [
            {"id": record["id"], "length": None, "folder": None, "problem": record["problem"]}
            for record in self.manifest["skipped"]
        ]

    @cached_property
    def passes(self) -> list[dict[str, int]]:
        """For each sequence: `forward` and `backward` passes of it, and `pieces`, tokens of parts of it that the curve
        took, as counted; `predicted_forward` and so on is the most that was predicted beforehand. `tokens` is what the
        forward passes computed: where a causal model shares a prefix, fewer than passes times tokens."""
        with (self.folder / "passes.csv").open(newline="", encoding="utf-8") as file:
            return [{name: int(cell) for name, cell in row.items() if name != "id"} for row in csv.DictReader(file)]

    def __getitem__(self, sequence: str | int) -> dict[str, dict[str, NDArray[Any]]]:
        """Tables by name (targets, spans, keys, surprise, curve), each a dictionary of columns; `curve` is that of the
        means, `curve_tokens` that of each token."""
        tables = {}
        for path in sorted(self.path(sequence).iterdir()):
            if path.suffix == ".parquet":
                columns = read_stored_table(path)
                name = "curve_tokens" if path.stem == "curve" else path.stem
                tables[name] = {column: columns[column].to_numpy() for column in columns.column_names}
            elif path.suffix == ".csv":
                with path.open(newline="", encoding="utf-8") as file:
                    header, *rows = list(csv.reader(file))
                tables[path.stem] = {
                    name: _column(name, path.stem, [row[place] for row in rows]) for place, name in enumerate(header)
                }
        return tables

    def path(self, sequence: str | int) -> Path:
        """The folder of a sequence."""
        return self.folder / self.row(sequence)["folder"]

    def figures(self, sequence: str | int) -> list[Path]:
        """The figures of a sequence, as .png files."""
        return sorted(self.path(sequence).glob("*.png"))

    def to_frame(self, sequence: str | int, name: str = "spans") -> Any:
        """A pandas data frame of one table of a sequence. Needs the extra `notebook`."""
        tables = self[sequence]
        if name not in tables:
            raise InputError(f"expected a table of {', '.join(tables)}, got {name!r}")
        return to_frame(tables[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)


def _column(name: str, table: str, cells: list[str]) -> NDArray[Any]:
    if name in _TEXT and table != "curve":
        return np.array(cells, dtype=object)
    if name in ("target", "start", "stop", "halvings", "context", "tokens"):
        return np.array(list(map(int, cells)), np.int64)
    return np.array([float(cell or "nan") for cell in cells], np.float64)
