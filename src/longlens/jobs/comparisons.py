"""The result object of `longlens.compare_models`: a row for each token, and a summary."""

from __future__ import annotations

from typing import Any

import numpy as np

from longlens.io.columns import columns_from
from longlens.report.arrow import ArrowTable, arrow_table
from longlens.report.tables import html_table, to_frame


class Comparison(ArrowTable):
    """How the predictions of two models differ. `data` is the content of the file, `manifest` its origin.

    found["kl_ab"]                              # a column, one number for each token
    found.summary["mean_kl_ab"]                 # means over the text, in nats
    found.to_frame()                            # pandas
    polars.DataFrame(found)                     # the same
    """

    def __init__(self, data: bytes, manifest: dict[str, Any]) -> None:
        self.data, self.manifest = data, manifest
        self.summary: dict[str, Any] = manifest["summary"]
        self._columns = columns_from(data, manifest["job"]["options"]["format"])

    @property
    def models(self) -> tuple[str, str]:
        """The names of models a and b."""
        return self.manifest["model"]["name"], self.manifest["other"]["name"]

    def columns(self) -> dict[str, Any]:
        """The table's columns: the texts as a list, numbers as arrays."""
        return {name: column if name == "text" else np.asarray(column) for name, column in self._columns.items()}

    def __getitem__(self, column: str) -> Any:
        return self.columns()[column]

    def __len__(self) -> int:
        return len(self._columns["token"])

    def to_frame(self) -> Any:
        """A pandas data frame of the table. Needs the extra `notebook`."""
        return to_frame(self.columns())

    def _arrow(self) -> Any:
        return arrow_table(self.columns())

    def __repr__(self) -> str:
        return f"<{self.models[0]} and {self.models[1]} on {len(self):,} tokens>"

    def _repr_html_(self) -> str:
        return html_table(self._columns, title=repr(self).strip("<>"), total=len(self))
