"""The base of result objects over proteins: a folder, its manifest, and a table with a row for each record."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from longlens.io.reading import find_row
from longlens.io.results import read_manifest
from longlens.io.stored import read_stored_table
from longlens.jobs.output import OutputFolder
from longlens.report.tables import html_table

# the columns of the table that a notebook shows
SHOWN = ("id", "length", "perplexity", "pairs", "problem")


class TableResults:
    """A folder of results with `index.parquet`. A temporary folder exists as long as this object is used."""

    # what messages call the results, and one of the sequences
    kind: ClassVar[str]
    unit: ClassVar[str] = "protein"

    def __init__(self, output: OutputFolder) -> None:
        self._output = output
        self.folder: Path = output.path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The origin of the results: the model, the options, the command, the machine, the dates."""
        return read_manifest(self.folder)

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """A row for each record; skipped records come last and have a `problem`."""
        rows: list[dict[str, Any]] = read_stored_table(self.folder / "index.parquet").to_pylist()
        return rows

    @property
    def model(self) -> str:
        """The model's name."""
        return self.manifest["model"]["name"]

    @property
    def ids(self) -> list[str]:
        """The ids of the proteins that were read, in order."""
        return [row["id"] for row in self.table if row["problem"] is None]

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """The rows of the records that could not be read."""
        return [row for row in self.table if row["problem"] is not None]

    def __len__(self) -> int:
        """The number of proteins that were read."""
        return len(self.ids)

    def row(self, protein: str | int) -> dict[str, Any]:
        """The table's row of a protein, by its id or number (from 0). Raises `InputError` unless just one matches."""
        return find_row(self.table, protein)

    def _repr_html_(self) -> str:
        shown = {name: [row[name] for row in self.table] for name in SHOWN if name in self.table[0]}
        if not self.skipped:
            shown.pop("problem")
        place = "" if self._output.temporary else f", in {self.folder}"
        title = f"{self._title}{place}"
        return html_table(shown, title=title, total=len(self.table), picture=self._picture())

    def _picture(self) -> str | None:
        """The HTML below the table."""
        return None

    def __repr__(self) -> str:
        return f"<{self._title}>"

    @property
    def _title(self) -> str:
        count = len(self)
        return f"{self.kind} of {count:,} {self.unit}{'' if count == 1 else 's'} by {self.model}"
