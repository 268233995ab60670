"""Read the results of `longlens embed`: `longlens.open_results("results/")`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.result_arrays import ABOUT, unique_names
from longlens.io.results import MANIFEST, read_manifest
from longlens.io.stored import open_stored_npz, read_stored_table, undamaged
from longlens.report import annotated, tables
from longlens.report.arrow import ArrowTable, with_vectors

# columns of the table that a notebook shows
SHOWN = ("record", "id", "description", "length", "surprise", "perplexity", "problem")


# kinds of arrays with a row for each protein; the others have one for each residue
PROTEIN_ARRAYS = ("mean", "bos")
# columns that say where the arrays are, which means nothing outside the folder
PLACES = ("file", "dataset", "row", "start", "stop", "problem")


class Results(ArrowTable):
    """What `longlens embed` wrote, as h5, zarr or npz.

    results = longlens.open_results("results/")
    results.table                               # one dictionary for each record
    results["mean/6"]                           # (proteins, d), rows as in the table
    results.residues("surprise", "P12345")      # (L,); also by number, or by a row of the table
    results.to_anndata().write_h5ad("v.h5ad")   # for scanpy
    polars.DataFrame(results)                   # the table, and a column of vectors for each array of proteins
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.table: list[dict[str, Any]] = read_stored_table(folder / "index.parquet").to_pylist()
        self._path, self._arrays = _open_arrays(folder)

    def __getitem__(self, name: str) -> Any:
        """An array by name; read by slicing it."""
        with undamaged(self._path):
            if name in self._arrays:
                return self._arrays[name]
        raise InputError(f"expected one of {', '.join(self)}, got {name!r}")

    def __iter__(self) -> Iterator[str]:
        """The arrays' names."""
        with undamaged(self._path):
            return iter(sorted(name for name in _names(self._arrays) if not name.startswith(ABOUT)))

    def _whole(self, name: str) -> Any:
        array = self[name]
        with undamaged(self._path):
            return array[:]

    def to_frame(self) -> Any:
        """The table as a pandas DataFrame; raises `InputError`, which names the extra, if pandas is missing."""
        return tables.to_frame(self._columns())

    def to_anndata(self, name: str | None = None) -> Any:
        """The vectors of proteins as an AnnData object. Needs the extra `anndata`.

        X is the array `name`, float32; None means the means of the last layer. `obs` has the table's columns, indexed
        by the ids, of which repeated ones get _2, _3, ... (the column `id` keeps them as they are). Other arrays of
        vectors are in `obsm` as X_MODEL_LAYER, or X_MODEL_bos_LAYER for start tokens; `uns["longlens"]` has the model,
        the array's name and the manifest as JSON.

        Raises `InputError` if there is no array with one vector for each protein.
        """
        vectors = self.vectors()
        name = name or self.default_vectors()
        if name not in vectors:
            raise InputError(
                f"expected an array with a vector for each protein, {', '.join(vectors)}, got {name!r}, "
                + ("which has other rows" if name in list(self) else "which the results do not have")
            )
        rows = [row for row in self.table if row["problem"] is None]
        model = self.manifest["model"]["name"]
        further = {}
        for other in vectors:
            kind, _, layer = other.partition("/")
            if other != name:
                further["_".join(["X", model, *([] if kind == "mean" else [kind]), layer])] = self._whole(other)
        return annotated.to_anndata(
            self._whole(name),
            unique_names([row["id"] for row in rows]),
            {column: [row[column] for row in rows] for column in self.table[0] if column not in PLACES},
            further=further,
            about={"model": model, "array": name, "manifest": json.dumps(self.manifest, sort_keys=True)},
        )

    def vectors(self) -> list[str]:
        """The names of the arrays with a vector for each protein."""
        return [name for name in self if name.partition("/")[0] in PROTEIN_ARRAYS]

    def default_vectors(self) -> str:
        """The means of the last layer, or, without means, the last of the vectors. Raises `InputError` if none."""
        vectors = self.vectors()
        if not vectors:
            raise InputError(
                f"expected an array with a vector for each protein, got {', '.join(self)}; embed with --include mean"
            )
        return max(vectors, key=lambda name: (name.startswith("mean/"), int(name.partition("/")[2])))

    def _arrow(self) -> Any:
        """The table, with a column of vectors for each array of proteins; skipped records have none."""
        table = read_stored_table(self.folder / "index.parquet").replace_schema_metadata()
        return with_vectors(table, {name: self._whole(name) for name in self.vectors()})

    def _columns(self) -> dict[str, list[Any]]:
        return {name: [row[name] for row in self.table] for name in (self.table[0] if self.table else ())}

    def _repr_html_(self) -> str:
        arrays = [{"array": name, "shape": tuple(self[name].shape), "dtype": str(self[name].dtype)} for name in self]
        columns = {name: [row[name] for row in arrays] for name in ("array", "shape", "dtype")}
        shown = {name: column for name, column in self._columns().items() if name in SHOWN}
        records = tables.html_table(shown, title=f"{self.folder}: {len(self.table):,} records", total=len(self.table))
        return records + tables.html_table(columns, title="arrays", total=len(arrays))

    def residues(self, name: str, protein: str | int | Mapping[str, Any]) -> NDArray[Any]:
        """The rows of one protein in an array that has a row for each residue.

        `protein`: its id, its number (from 0) or its row of the table. Raises `InputError` if it was skipped.
        """
        row = protein if isinstance(protein, Mapping) else find_row(self.table, protein)
        if row["start"] is None:
            raise InputError(f"expected a record that was read, got {row['id'] or row['record']}: {row['problem']}")
        array = self[name]
        with undamaged(self._path):
            return np.asarray(array[row["start"] : row["stop"]])


def find_row(table: Sequence[dict[str, Any]], protein: str | int) -> dict[str, Any]:
    """The row of a record that was read, by its id or number (from 0); skipped records are the last ones.

    Raises `InputError` unless just one matches.
    """
    if isinstance(protein, Integral):
        count = sum(row["problem"] is None for row in table)
        if not -count <= protein < count:
            raise InputError(f"expected a protein's number in 0..{count - 1}, got {protein}")
        return table[int(protein) % count]
    rows = [row for row in table if row["id"] == protein]
    if len(rows) != 1:
        several = f"{len(rows)} records have it: use the number of the one that is meant" if rows else "none has it"
        raise InputError(f"expected the id of one protein, got {protein!r}; {several}")
    if rows[0]["problem"] is not None:
        raise InputError(f"expected a record that was read, got {protein!r}: {rows[0]['problem']}")
    return rows[0]


def open_results(folder: str | Path) -> Results:
    """The results in a folder; raises `InputError` if there are none, or if the job is not finished."""
    path = Path(folder)
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise InputError(f"expected {path} to hold results of longlens embed, found no {MANIFEST}")
    if not read_manifest(path)["complete"]:
        raise InputError(f"expected a finished job, got one in {path} that is not; run its command again")
    if not (path / "index.parquet").is_file():
        raise InputError(f"expected {path} to hold results of longlens embed, found those of another command")
    return Results(path)


def _open_arrays(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The file or folder of the arrays, and the arrays."""
    for name in ("arrays.h5", "arrays.zarr", "arrays.npz"):
        path = folder / name
        if path.exists():
            with undamaged(path):
                return path, _opened(path)
    raise InputError(
        f"expected arrays.h5, arrays.zarr or arrays.npz in {folder}; read other formats with the tools they are for"
    )


def _opened(path: Path) -> Any:
    if path.suffix == ".h5":
        import h5py

        return h5py.File(path, "r")
    if path.suffix == ".zarr":
        import zarr

        return zarr.open_group(path, mode="r")
    return open_stored_npz(path)


def _names(group: Any, before: str = "") -> Iterator[str]:
    for name in group:
        part = group[name]
        if hasattr(part, "shape"):
            yield f"{before}{name}"
        else:
            yield from _names(part, f"{before}{name}/")
