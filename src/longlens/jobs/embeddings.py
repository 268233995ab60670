"""The result object of `longlens.embed`: arrays by protein, a table, a data frame."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.reading import PROTEIN_ARRAYS, Results, open_results
from longlens.jobs.table_results import TableResults
from longlens.report.arrow import ArrowTable
from longlens.report.tables import to_frame


class Embeddings(ArrowTable, TableResults):
    """Vectors and other arrays of proteins, in a folder (`folder`); `table` has a row for each record.

    embeddings["P12345"]                        # one protein's vector (d,), or its array by residue
    embeddings.array("mean/6")                  # all proteins' (P, d), rows in the order of `ids`
    embeddings.residues("surprise", "P12345")   # (L,)
    embeddings.to_frame()                       # pandas: a row for each protein
    embeddings.to_anndata().write_h5ad("v.h5ad")
    polars.DataFrame(embeddings)                # the table, and a column of vectors for each array of proteins
    """

    kind = "embeddings"

    @cached_property
    def _results(self) -> Results:
        return open_results(self.folder)

    @property
    def names(self) -> list[str]:
        """The arrays' names, such as "mean/6" and "surprise"."""
        return list(self._results)

    def array(self, name: str) -> NDArray[Any]:
        """An array with one row for each protein, or for each residue of the concatenated proteins."""
        return np.asarray(self._results[name][:])

    def residues(self, name: str, protein: str | int) -> NDArray[Any]:
        """The rows of one protein in an array that has a row for each residue."""
        if not self._by_residue(name):
            raise InputError(f"expected an array with a row for each residue, got {name!r}; use array({name!r})")
        return self._results.residues(name, self.row(protein))

    def __getitem__(self, protein: str | int) -> NDArray[Any]:
        """A protein's mean over residues in the last layer, or its rows in the first array if there is no mean."""
        return self.get(self._first, protein)

    def get(self, name: str, protein: str | int) -> NDArray[Any]:
        """A protein's rows in an array: one row, or one for each of its residues."""
        if self._by_residue(name):
            return self.residues(name, protein)
        return np.asarray(self._results[name][self.row(protein)["row"]])

    def to_frame(self, name: str | None = None) -> Any:
        """A pandas data frame of an array; None means the means of the last layer.

        Rows are proteins, indexed by id, or residues, indexed by id and position (from 1). Needs the extra `notebook`.
        """
        name = name or self._first
        values = self.array(name)
        rows = [row for row in self.table if row["row"] is not None]
        index: dict[Any, Any] = {"id": [row["id"] for row in rows]}
        if self._by_residue(name):
            lengths = [row["length"] for row in rows]
            index = {
                "id": np.repeat(np.array(index["id"], object), lengths),
                "position": np.concatenate([np.arange(1, length + 1) for length in lengths]),
            }
        columns: dict[Any, Any] = (
            {name: values} if values.ndim == 1 else {place: values[:, place] for place in range(values.shape[1])}
        )
        return to_frame(index | columns).set_index(list(index))

    def to_anndata(self, name: str | None = None) -> Any:
        """The vectors of proteins as an AnnData object (`longlens.Results.to_anndata`). Needs the extra `anndata`."""
        return self._results.to_anndata(name)

    def _arrow(self) -> Any:
        return self._results._arrow()

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def _by_residue(self, name: str) -> bool:
        self._results[name]
        return name.partition("/")[0] not in PROTEIN_ARRAYS

    @cached_property
    def _first(self) -> str:
        """The default array: the mean of the last layer, or else the first array."""
        means = [name for name in self.names if name.startswith("mean/")]
        return max(means, key=lambda name: int(name.partition("/")[2])) if means else self.names[0]
