"""Final files from raw arrays: HDF5, Zarr, NumPy, Parquet, or one PyTorch file for each protein as fair-esm writes.

The HDF5 files of other tools, with a dataset for each protein or for scikit-bio, are in `longlens.io.hdf5_formats`.

The same arrays give the same bytes: no times, no names of the machine. Rows are copied a stretch at a time. Every file
names its model and has the proteins' ids and lengths (HDF5, Zarr and NumPy under `about/`).
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from longlens.errors import InputError
from longlens.io.hdf5_formats import write_h5, write_h5_by_id, write_scikit_bio
from longlens.io.result_arrays import ABOUT, STRETCH, ResultArrays, release_pages, stretches

FORMATS = ("h5", "h5-by-id", "scikit-bio", "zarr", "pt", "npz", "parquet")


def require_zarr() -> None:
    """Raise `InputError` if Zarr is not installed; called before any computation."""
    if find_spec("zarr") is None:
        raise InputError("expected zarr to be installed for the format zarr; install longlens[zarr], or choose another")


def write_arrays(finished: ResultArrays, format: str, folder: Path) -> Path:
    """Write all arrays to `folder` in a format of `FORMATS`; returns the file or folder made."""
    folders = {"pt": "proteins", "h5-by-id": "by-id", "scikit-bio": "scikit-bio"}
    target = folder / folders.get(format, f"arrays.{format}")
    _WRITERS[format](finished, target)
    return target


def _write_zarr(finished: ResultArrays, target: Path) -> None:
    import zarr

    shutil.rmtree(target, ignore_errors=True)
    root = zarr.open_group(target, mode="w")
    root.attrs.update({**finished.about, "ids": finished.ids, "lengths": finished.lengths.tolist()})
    for name, array in finished.arrays.items():
        rows = max(1, min(len(array), 2**20 // max(1, array[:1].nbytes)))
        target_array = root.create_array(name, shape=array.shape, dtype=array.dtype, chunks=(rows, *array.shape[1:]))
        step = rows * max(1, STRETCH // 2**20)
        for start in range(0, len(array), step):
            target_array[start : start + step] = array[start : start + step]
            release_pages(array)


def _write_npz(finished: ResultArrays, target: Path) -> None:
    about = {name: np.array(text) for name, text in finished.about.items()}
    about |= {"ids": np.array(finished.ids), "lengths": finished.lengths}
    arrays = {**finished.arrays, **{f"{ABOUT}{name}": array for name, array in about.items()}}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # the earliest time that a zip file can hold, so that the bytes do not depend on the clock
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as file:
                header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_2_0(file, header)
                if array.ndim == 0:
                    file.write(array.tobytes())
                    continue
                for rows in stretches(array):
                    file.write(np.ascontiguousarray(array[rows]).tobytes())


def _write_parquet(finished: ResultArrays, target: Path) -> None:
    """One row for each protein; residues' arrays as lists of one item for each residue."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    starts, writer = finished.starts, None
    width = sum(array[:1].nbytes for array in finished.arrays.values())
    first = 0
    while first < len(starts) - 1:
        last = first + 1
        while last < len(starts) - 1 and (starts[last + 1] - starts[first]) * max(1, width) < STRETCH:
            last += 1
        columns: dict[str, Any] = {
            "id": pa.array(finished.ids[first:last], pa.string()), "length": pa.array(finished.lengths[first:last]),
        }  # fmt: skip
        for spec in finished.specs:
            residues = spec.axis == "residue"
            rows = slice(starts[first], starts[last]) if residues else slice(first, last)
            values = np.ascontiguousarray(finished.arrays[spec.name][rows])
            column = pa.array(values.reshape(-1))
            if spec.row:
                column = pa.FixedSizeListArray.from_arrays(column, int(np.prod(spec.row)))
            if residues:
                column = pa.LargeListArray.from_arrays(pa.array(starts[first : last + 1] - starts[first]), column)
            columns[spec.name] = column
        table = pa.table(columns).replace_schema_metadata({"longlens": json.dumps(dict(finished.about))})
        writer = writer or pq.ParquetWriter(target, table.schema, use_dictionary=["id"])
        writer.write_table(table)
        for array in finished.arrays.values():
            release_pages(array)
        first = last
    if writer is not None:
        writer.close()


def _write_pt(finished: ResultArrays, target: Path) -> None:
    """`proteins/0000001.pt`, ...: the dictionary that fair-esm's esm-extract writes, and our arrays by name."""
    import torch

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    keys = {"per_tok": "representations", "mean": "mean_representations", "bos": "bos_representations"}
    for place, label in enumerate(finished.ids):
        content: dict[str, Any] = {"label": label, "model": finished.about["model"]}
        for spec in finished.specs:
            array = finished.arrays[spec.name]
            residues = spec.axis == "residue"
            rows = array[finished.starts[place] : finished.starts[place + 1]] if residues else array[place]
            tensor = torch.from_numpy(np.array(rows))
            kind, _, layer = spec.name.partition("/")
            if layer:
                content.setdefault(keys[kind], {})[int(layer)] = tensor
            else:
                content[kind] = tensor
        # through memory, because torch.save hides the error of a full disk
        buffer = io.BytesIO()
        torch.save(content, buffer)
        (target / f"{place + 1:07d}.pt").write_bytes(buffer.getvalue())
        for array in finished.arrays.values():
            release_pages(array)


_WRITERS: dict[str, Callable[[ResultArrays, Path], None]] = {
    "h5": write_h5,
    "h5-by-id": write_h5_by_id,
    "scikit-bio": write_scikit_bio,
    "zarr": _write_zarr,
    "pt": _write_pt,
    "npz": _write_npz,
    "parquet": _write_parquet,
}
