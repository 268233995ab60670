"""The result object of `longlens.surprise`: a table by token, word or line, and a summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from longlens.io.columns import columns_from
from longlens.report.arrow import ArrowTable, arrow_table
from longlens.report.coloured import coloured_html
from longlens.report.figures import has_matplotlib, inline
from longlens.report.surprise import draw_surprise
from longlens.report.tables import html_table, to_frame

if TYPE_CHECKING:
    from longlens.report.figures import Figure


class Surprise(ArrowTable):
    """How surprised a model is by a text. `data` is the content of the file, `manifest` its origin.

    surprise["surprise"]                        # a column: one number for each token, word or line
    surprise.summary["bits_per_byte"]           # numbers of the whole text, in nats
    surprise.to_frame()                         # pandas
    polars.DataFrame(surprise)                  # the same
    surprise.draw().savefig("surprise.png")
    """

    def __init__(self, data: bytes, manifest: dict[str, Any]) -> None:
        self.data, self.manifest = data, manifest
        finish = manifest["job"]["finish"]
        self.by, self.unit = str(finish["by"]), str(finish["unit"])
        self.summary: dict[str, Any] = manifest["summary"]
        self._columns = columns_from(data, finish["format"])

    @property
    def model(self) -> str:
        """The model's name."""
        return self.manifest["model"]["name"]

    def columns(self) -> dict[str, Any]:
        """The table's columns: lists of texts, and arrays of numbers."""
        return {name: column if name == "text" else np.asarray(column) for name, column in self._columns.items()}

    def __getitem__(self, column: str) -> Any:
        return self.columns()[column]

    def __len__(self) -> int:
        return len(self._columns["surprise"])

    def to_frame(self) -> Any:
        """A pandas data frame of the table. Needs the extra `notebook`."""
        return to_frame(self.columns())

    def _arrow(self) -> Any:
        return arrow_table(self.columns())

    def draw(self) -> Figure:
        """Surprise along the text, a matplotlib figure. Needs the extra `plot`."""
        return draw_table(self.columns(), self.by, self.unit, self._title)

    @property
    def _title(self) -> str:
        return f"surprise by {self.by}, {self.manifest['proteins']['ids'][0]}, {self.model}"

    def __repr__(self) -> str:
        each = self.summary["bits_per_byte"]
        size = "no byte of its own" if each is None else f"{each:.3f} bits per byte"
        return f"<surprise of {len(self):,} {self.by}{'' if len(self) == 1 else 's'} by {self.model}, {size}>"

    def _repr_html_(self) -> str:
        picture = inline(self.draw()) if has_matplotlib() else ""
        if self.by != "line":
            texts = [text if self.by == "token" else f"{text} " for text in self._columns["text"]]
            picture = coloured_html(texts, self["surprise"], name=f"surprise in {self.unit}", first=0) + picture
        return html_table(self._columns, title=repr(self).strip("<>"), total=len(self), picture=picture)


def draw_table(columns: dict[str, Any], by: str, unit: str, title: str) -> Figure:
    """The figure of a table."""
    value = "bits_per_byte" if by == "line" else "surprise"
    entropy = columns.get("entropy")
    texts = columns["text"] if by != "line" else None
    shown = "bits per byte" if by == "line" else unit
    return draw_surprise(
        np.asarray(columns[value], np.float64), None if entropy is None else np.asarray(entropy, np.float64), texts,
        unit=shown, each=by, title=title, first=int(columns[by][0]) if len(columns[by]) else 0,
    )  # fmt: skip
