"""The results of `longlens.embed`: arrays by protein, a table, a data frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.reading import Results, open_results
from longlens.jobs.table_results import TableResults
from longlens.report.tables import require_pandas


class Embeddings(TableResults):
    """Vectors and other arrays of proteins, in a folder (`folder`); `table` has a row for each record.

    embeddings["P12345"]                        # one protein's vector (d,), or its array by residue
    embeddings.array("mean/6")                  # all proteins' (P, d), rows in the order of `ids`
    embeddings.residues("surprise", "P12345")   # (L,)
    embeddings.to_frame()                       # pandas: a row for each protein
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
        """An array, one row for each protein, or for each residue of all proteins end to end."""
        return np.asarray(self._results[name][:])

    def residues(self, name: str, protein: str | int) -> NDArray[Any]:
        """One protein's part of an array that has a row for each residue."""
        if not self._by_residue(name):
            raise InputError(f"expected an array with a row for each residue, got {name!r}; use array({name!r})")
        return self._results.residues(name, self.row(protein))

    def __getitem__(self, protein: str | int) -> NDArray[Any]:
        """The first array's part of a protein, by id or number."""
        return self.get(self.names[0] if "mean" not in self._groups else self._groups["mean"][-1], protein)

    def get(self, name: str, protein: str | int) -> NDArray[Any]:
        """A protein's part of an array: a row, or a row for each of its residues."""
        if self._by_residue(name):
            return self.residues(name, protein)
        return np.asarray(self._results[name][self.row(protein)["row"]])

    def to_frame(self, name: str | None = None) -> Any:
        """A pandas data frame of an array, the means of the last layer where `name` is None.

        Rows are proteins, indexed by id, or residues, indexed by id and position (from 1). Needs the extra `notebook`.
        """
        pd = require_pandas()
        name = name or (self._groups["mean"][-1] if "mean" in self._groups else self.names[0])
        values = self.array(name)
        rows = [row for row in self.table if row["row"] is not None]
        if self._by_residue(name):
            ids = np.repeat(np.array([row["id"] for row in rows], object), [row["length"] for row in rows])
            positions = np.concatenate([np.arange(1, row["length"] + 1) for row in rows])
            index = pd.MultiIndex.from_arrays([ids, positions], names=["id", "position"])
        else:
            index = pd.Index([row["id"] for row in rows], name="id")
        columns = [name] if values.ndim == 1 else range(values.shape[1])
        return pd.DataFrame(values, index=index, columns=columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def _by_residue(self, name: str) -> bool:
        self._results[name]
        return name.partition("/")[0] not in ("mean", "bos")

    @cached_property
    def _groups(self) -> Mapping[str, list[str]]:
        """Array names by what they are, by layer."""
        groups: dict[str, list[str]] = {}
        for name in sorted(self.names, key=lambda name: int(name.partition("/")[2] or 0)):
            groups.setdefault(name.partition("/")[0], []).append(name)
        return groups
