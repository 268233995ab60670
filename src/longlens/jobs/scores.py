"""The result objects of `longlens.score`: a score for each variant, or the matrix of all substitutions."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longlens.io.alphabet import STANDARD
from longlens.jobs.variant_table import PROBLEM, VariantTable
from longlens.report.arrow import ArrowTable, arrow_table
from longlens.report.coloured import coloured_html
from longlens.report.figures import has_matplotlib, inline
from longlens.report.tables import html_table, to_frame
from longlens.report.variants import draw_substitutions

if TYPE_CHECKING:
    from longlens.report.figures import Figure


class Scores(ArrowTable):
    """Scores of variants, in the order of their table. `text` is the content of the file, `manifest` its origin.

    scores.scores                               # (V,), NaN where a variant was skipped
    scores["K2A"]
    scores.to_frame()                           # pandas: the table with its new column
    polars.DataFrame(scores)                    # the same
    """

    def __init__(self, text: str, manifest: dict[str, Any], column: str, table: VariantTable) -> None:
        self.text, self.manifest, self.column = text, manifest, column
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=table.table.delimiter))
        self.variants = [row[table.column] for row in rows]
        self.scores: NDArray[np.float64] = np.array([float(row[column] or "nan") for row in rows], np.float64)
        # without skipped rows, a column of that name is the user's own
        self.problems = [""] * len(rows) if table.problems is None else [row[PROBLEM] for row in rows]
        self._rows = rows

    @property
    def model(self) -> str:
        """The model's name."""
        return self.manifest["model"]["name"]

    @property
    def skipped(self) -> int:
        """The number of variants without a score."""
        return sum(problem != "" for problem in self.problems)

    def __len__(self) -> int:
        return len(self.variants)

    def __iter__(self) -> Iterator[str]:
        return iter(self.variants)

    def __getitem__(self, variant: str) -> float:
        """The score of a variant as it is written in the table; of the first one if it occurs twice."""
        if variant not in self.variants:
            raise KeyError(variant)
        return float(self.scores[self.variants.index(variant)])

    def columns(self) -> dict[str, Any]:
        """The table's columns, the scores as numbers."""
        names = self._rows[0] if self._rows else {}
        return {name: [row[name] for row in self._rows] for name in names} | {self.column: self.scores}

    def to_frame(self) -> Any:
        """A pandas data frame of the table with its new column. Needs the extra `notebook`."""
        return to_frame(self.columns())

    def _arrow(self) -> Any:
        return arrow_table(self.columns())

    def __repr__(self) -> str:
        return f"<scores of {len(self):,} variants by {self.model}>"

    def _repr_html_(self) -> str:
        strategy = self.manifest["job"]["options"]["strategy"]
        return html_table(self.columns(), title=f"{len(self):,} variants by {self.model}, {strategy}", total=len(self))


class Substitutions(ArrowTable):
    """Scores of all substitutions of one protein: `matrix` (L, 20), columns as `residues`; 0 where a residue stays.

    `text` is the content of the file, `manifest` its origin, `first` the number of the first residue.

    substitutions["K2A"]
    substitutions.to_frame()                    # pandas: a row for each position
    polars.DataFrame(substitutions)             # the same
    substitutions.draw().savefig("matrix.png")  # a heat map
    """

    residues = STANDARD
    skipped = 0

    def __init__(self, text: str, manifest: dict[str, Any], sequence: str, first: int) -> None:
        self.text, self.manifest, self.sequence, self.first = text, manifest, sequence, first
        rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
        self.matrix: NDArray[np.float32] = np.array([row[2:] for row in rows], np.float32)

    @property
    def model(self) -> str:
        """The model's name."""
        return self.manifest["model"]["name"]

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, variant: str) -> float:
        """The score of a substitution such as "K2A"."""
        place = int(variant[1:-1]) - self.first
        if not 0 <= place < len(self) or self.sequence[place] != variant[0] or variant[-1] not in self.residues:
            raise KeyError(variant)
        return float(self.matrix[place, self.residues.index(variant[-1])])

    def columns(self) -> dict[str, Any]:
        """Position, wild type, and a column for each residue that it becomes."""
        scores = {residue: self.matrix[:, place] for place, residue in enumerate(self.residues)}
        positions = np.arange(self.first, self.first + len(self))
        return {"position": positions, "wild_type": list(self.sequence), **scores}

    def to_frame(self) -> Any:
        """A pandas data frame with a row for each position. Needs the extra `notebook`."""
        return to_frame(self.columns())

    def draw(self) -> Figure:
        """The matrix as a heat map, a matplotlib figure. Needs the extra `plot`."""
        named = self.manifest["proteins"]["ids"][0]
        title = ", ".join(filter(None, (named, self.model, self.manifest["job"]["options"]["strategy"])))
        return draw_substitutions(self.matrix, self.sequence, title=title, first=self.first)

    def _arrow(self) -> Any:
        return arrow_table(self.columns())

    def __repr__(self) -> str:
        return f"<all substitutions of {len(self):,} residues by {self.model}>"

    def _repr_html_(self) -> str:
        means = self.matrix.sum(1) / (len(self.residues) - 1)
        tolerance = coloured_html(self.sequence, -means, name="mean loss of its 19 substitutions", first=self.first)
        picture = tolerance + (inline(self.draw()) if has_matplotlib() else "")
        return html_table(self.columns(), title=f"all substitutions by {self.model}", total=len(self), picture=picture)
