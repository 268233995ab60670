"""Files of residue pairs: pairs are appended as they are computed, and memory does not grow with their number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from longlens.io.contact_rr import write_rr
from longlens.io.results import sync_tree

# columns and their types; residues are numbered from 0 here
COLUMNS = {"i": "int32", "j": "int32", "probability": "float32"}
# pairs copied at a time
STRETCH = 2**20


class PairSpool:
    """Three growing files of numbers in a folder, one for each column."""

    def __init__(self, folder: Path) -> None:
        self._paths = {name: folder / f"{name}.raw" for name in COLUMNS}
        self._files = {name: path.open("wb") for name, path in self._paths.items()}
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, path in self._paths.items():
            self._files[name].close()
            path.unlink(missing_ok=True)

    def append(self, i: NDArray[Any], j: NDArray[Any], probability: NDArray[Any]) -> None:
        """Add pairs: three arrays of one length."""
        for (name, kind), values in zip(COLUMNS.items(), (i, j, probability), strict=True):
            values.astype(kind, copy=False).tofile(self._files[name])
        self.count += len(i)

    def write(self, path: Path, residues: int, about: Mapping[str, str]) -> None:
        """All pairs as a file, moved into place whole, with `about`: the model, the protein.

        `.parquet`: a table of i, j (from 1) and probability. `.npz`: a sparse matrix (T, T) in COO form that
        `scipy.sparse.load_npz` reads (row, col from 0, data). `.rr`: CASP's format, of which each pair is once.
        """
        for file in self._files.values():
            file.flush()
        columns = {
            name: np.memmap(self._paths[name], kind, "r") if self.count else np.empty(0, kind)
            for name, kind in COLUMNS.items()
        }
        half = path.with_name(f".{path.stem}.half{path.suffix}")
        if path.suffix == ".parquet":
            self._write_parquet(half, columns, about)
        elif path.suffix == ".rr":
            write_rr(half, columns["i"], columns["j"], columns["probability"], about)
        else:
            arrays: dict[str, Any] = {
                "row": columns["i"], "col": columns["j"], "data": columns["probability"],
                "format": np.array(b"coo"), "shape": np.array([residues, residues]),
                **{f"about/{name}": np.array(text) for name, text in about.items()},
            }  # fmt: skip
            np.savez(half, **arrays)
        sync_tree(half)
        half.replace(path)

    def _write_parquet(self, path: Path, columns: dict[str, NDArray[Any]], about: Mapping[str, str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([("i", pa.int32()), ("j", pa.int32()), ("probability", pa.float32())])
        schema = schema.with_metadata({"longlens": json.dumps(dict(about))})
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, self.count, STRETCH):
                part = {name: values[start : start + STRETCH] for name, values in columns.items()}
                arrays = [part["i"] + np.int32(1), part["j"] + np.int32(1), np.asarray(part["probability"])]
                writer.write_table(pa.table(arrays, schema=schema))
