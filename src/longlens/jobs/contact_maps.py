"""The result object of `longlens.contacts`: the pairs or the map of each protein."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.contact_rr import read_rr
from longlens.io.stored import open_stored_npz, read_stored_table, undamaged
from longlens.jobs.table_results import TableResults
from longlens.report.arrow import ArrowTable, stream_of
from longlens.report.contacts import CELLS, draw_contacts
from longlens.report.figures import has_matplotlib, inline
from longlens.report.tables import to_frame

if TYPE_CHECKING:
    from longlens.report.figures import Figure

# numbers of a whole map that are read at a time
ELEMENTS = 2**20


class ContactMaps(ArrowTable, TableResults):
    """Contacts of proteins, in a folder (`folder`); `table` has a row for each record.

    maps["P12345"]                              # what was kept: "i", "j" (from 1), "probability", each (M,)
    maps.matrix("P12345")                       # (L, L), symmetric, 0 where a pair was not kept
    maps.to_frame()                             # pandas: a row for each pair that was kept
    polars.DataFrame(maps)                      # the same; proteins are read one at a time
    maps.draw("P12345").savefig("map.png")      # a figure
    """

    kind = "contact maps"

    def __getitem__(self, protein: str | int) -> dict[str, NDArray[Any]]:
        """The pairs of a protein, i < j; with the option `top` also j < i, but not in the format rr."""
        path = self._path(protein)
        if path.suffix == ".parquet":
            table = read_stored_table(path)
            with undamaged(path):
                return {name: table[name].to_numpy() for name in ("i", "j", "probability")}
        if path.suffix == ".npz":
            with undamaged(path), open_stored_npz(path) as file:
                return {"i": file["row"] + 1, "j": file["col"] + 1, "probability": file["data"]}
        if path.suffix == ".rr":
            held, count = read_rr(path), self.row(protein)["pairs"]
            if len(held.i) != count:
                raise InputError(
                    f"{path}: expected {count:,} pairs, got {len(held.i):,}; it was cut off or "
                    "changed since: run longlens contacts again, with a new output"
                )
            return {"i": held.i, "j": held.j, "probability": held.probability.astype(np.float32)}
        matrix = self.matrix(protein)
        i, j = np.triu_indices(len(matrix), 1)
        return {"i": i + 1, "j": j + 1, "probability": matrix[i, j]}

    def matrix(self, protein: str | int) -> NDArray[Any]:
        """(L, L), symmetric; 0 for pairs that were not kept. It takes 4 L^2 bytes."""
        path = self._path(protein)
        if path.suffix == ".zarr":
            with undamaged(path):
                return np.asarray(_open_map(path)[:])
        length, pairs = self.row(protein)["length"], self[protein]
        whole = np.zeros((length, length), np.float32)
        i, j = pairs["i"] - 1, pairs["j"] - 1
        whole[i, j] = whole[j, i] = pairs["probability"]
        return whole

    def to_frame(self) -> Any:
        """A pandas data frame: id, i, j (from 1) and probability of every pair. Needs the extra `notebook`."""
        pairs = [self[number] for number in range(len(self))]
        ids = np.repeat(np.array(self.ids, object), [len(part["i"]) for part in pairs])
        return to_frame({
            "id": ids, **{name: np.concatenate([part[name] for part in pairs]) for name in ("i", "j", "probability")}
        })  # fmt: skip

    def _arrow(self) -> Any:
        """As `to_frame`, some pairs at a time."""
        kinds = {"id": pa.string(), "i": pa.int32(), "j": pa.int32(), "probability": pa.float32()}
        schema = pa.schema(list(kinds.items()))
        tables = (self._table(number, part, schema) for number in range(len(self)) for part in self._parts(number))
        return stream_of(tables, schema)

    def _table(self, number: int, pairs: dict[str, NDArray[Any]], schema: Any) -> Any:
        """Pairs of a protein as a pyarrow Table; of a whole map, in which each pair is twice, those with i < j."""
        if self._path(number).suffix == ".zarr":
            upper = pairs["i"] < pairs["j"]
            pairs = {name: values[upper] for name, values in pairs.items()}
        ids = pa.array([self.ids[number]] * len(pairs["i"]), pa.string())
        columns = [pairs["i"].astype(np.int32), pairs["j"].astype(np.int32), pairs["probability"].astype(np.float32)]
        return pa.table([ids, *columns], schema=schema)

    def draw(self, protein: str | int) -> Figure:
        """The map of a protein as a matplotlib figure; pairs that were not kept are white. Needs the extra `plot`."""
        row = self.row(protein)
        residues = row["length"]
        width = -(-residues // CELLS)
        cells = np.zeros((-(-residues // width),) * 2, np.float32)
        for pairs in self._parts(protein):
            i, j = ((pairs[name] - 1) // width for name in ("i", "j"))
            np.maximum.at(cells, (i, j), pairs["probability"])
        return draw_contacts(np.maximum(cells, cells.T), residues, f"{row['id']}, {residues:,} residues", self.model)

    def _parts(self, protein: str | int) -> Iterator[dict[str, NDArray[Any]]]:
        """The pairs of a protein; those of a whole map some rows at a time, so that memory is linear in its length."""
        path = self._path(protein)
        if path.suffix != ".zarr":
            yield self[protein]
            return
        array = _open_map(path)
        rows = max(1, ELEMENTS // array.shape[0])
        for first in range(0, array.shape[0], rows):
            with undamaged(path):
                part = np.asarray(array[first : first + rows])
            i = np.repeat(np.arange(first, first + len(part)) + 1, part.shape[1])
            j = np.tile(np.arange(part.shape[1]) + 1, len(part))
            yield {"i": i, "j": j, "probability": part.ravel()}

    def _picture(self) -> str | None:
        return inline(self.draw(0)) if len(self) and has_matplotlib() else None

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def _path(self, protein: str | int) -> Path:
        return self.folder / self.row(protein)["file"]


def _open_map(path: Path) -> Any:
    import zarr

    with undamaged(path):
        return zarr.open_array(path, mode="r")
