"""Read the results of `longlens embed`: `longlens.open_results("results/")`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.result_arrays import ABOUT
from longlens.io.results import MANIFEST, read_manifest
from longlens.report import tables

# columns of the table that a notebook shows
SHOWN = ("record", "id", "description", "length", "surprise", "perplexity", "problem")


class Results:
    """What `longlens embed` wrote, as h5, zarr or npz.

    results = longlens.open_results("results/")
    results.table                               # one dictionary for each record
    results["mean/6"]                           # (proteins, d), rows as in the table
    results.residues("surprise", results.table[0])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.table: list[dict[str, Any]] = pq.read_table(folder / "index.parquet").to_pylist()
        self._arrays: Mapping[str, Any] = _open_arrays(folder)

    def __getitem__(self, name: str) -> Any:
        """An array by name; read by slicing it."""
        try:
            return self._arrays[name]
        except KeyError:
            raise InputError(f"expected one of {', '.join(self)}, got {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        """The arrays' names."""
        return iter(sorted(name for name in _names(self._arrays) if not name.startswith(ABOUT)))

    def to_frame(self) -> Any:
        """The table as a pandas DataFrame; raises `InputError`, which names the extra, if pandas is missing."""
        return tables.to_frame(self._columns())

    def _columns(self) -> dict[str, list[Any]]:
        return {name: [row[name] for row in self.table] for name in (self.table[0] if self.table else ())}

    def _repr_html_(self) -> str:
        arrays = [{"array": name, "shape": tuple(self[name].shape), "dtype": str(self[name].dtype)} for name in self]
        columns = {name: [row[name] for row in arrays] for name in ("array", "shape", "dtype")}
        shown = {name: column for name, column in self._columns().items() if name in SHOWN}
        records = tables.html_table(shown, title=f"{self.folder}: {len(self.table):,} records", total=len(self.table))
        return records + tables.html_table(columns, title="arrays", total=len(arrays))

    def residues(self, name: str, row: Mapping[str, Any]) -> NDArray[Any]:
        """The rows of one protein in an array that has a row for each residue. Raises `InputError` if skipped."""
        if row["start"] is None:
            raise InputError(f"expected a record that was read, got {row['id'] or row['record']}: {row['problem']}")
        return np.asarray(self[name][row["start"] : row["stop"]])


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


def _open_arrays(folder: Path) -> Mapping[str, Any]:
    for name in ("arrays.h5", "arrays.zarr", "arrays.npz"):
        path = folder / name
        if path.suffix == ".h5" and path.exists():
            import h5py

            return h5py.File(path, "r")
        if path.suffix == ".zarr" and path.exists():
            import zarr

            group: Any = zarr.open_group(path, mode="r")
            return group
        if path.exists():
            return np.load(path)
    raise InputError(
        f"expected arrays.h5, arrays.zarr or arrays.npz in {folder}; read other formats with the tools they are for"
    )


def _names(group: Any, before: str = "") -> Iterator[str]:
    for name in group:
        part = group[name]
        if hasattr(part, "shape"):
            yield f"{before}{name}"
        else:
            yield from _names(part, f"{before}{name}/")
