"""HDF5 files: arrays of all proteins, a dataset for each protein as UniProt distributes them, and scikit-bio's.

The last two hold one array to a file, in a folder with a file for each array: `by-id/mean_6.h5`.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.accessions import accession_of
from longlens.io.result_arrays import ABOUT, ResultArrays, release_pages, stretches, unique_names
from longlens.io.results import ArraySpec


def write_h5(finished: ResultArrays, target: Path) -> None:
    """One file with every array under its name, and the ids and lengths under `about/`."""
    import h5py

    with h5py.File(target, "w") as file:
        file.attrs.update(finished.about)
        names = file.create_dataset(f"{ABOUT}ids", len(finished.ids), h5py.string_dtype(), track_times=False)
        names[:] = finished.ids
        file.create_dataset(f"{ABOUT}lengths", data=finished.lengths, track_times=False)
        for name, array in finished.arrays.items():
            dataset = file.create_dataset(name, array.shape, array.dtype, track_times=False)
            for rows in stretches(array):
                dataset[rows] = array[rows]


def dataset_names(ids: Sequence[str]) -> list[str]:
    """The name of each protein's dataset in the format h5-by-id, in the order of the proteins.

    The name is the UniProt accession, where the id holds one that no other protein has, and otherwise the id, with "/"
    and "." replaced by "_" (a "/" would make a group of HDF5). Of equal names all but the first get _2, _3, ...; the
    datasets' attribute `original_id` has the id as it was.
    """
    accessions = [accession_of(id) for id in ids]
    count = Counter(accessions)
    names = [
        accession if accession is not None and count[accession] == 1 else id.replace("/", "_").replace(".", "_")
        for id, accession in zip(ids, accessions, strict=True)
    ]
    return unique_names([name or "protein" for name in names])


def write_h5_by_id(finished: ResultArrays, target: Path) -> None:
    """A file for each array, with a dataset for each protein at the root: (d,), (L, d) or (L,).

    The root's attribute `model_name` and the datasets' `original_id` are what ProtSpace and biotrainer read.
    """
    names = dataset_names(finished.ids)
    for spec, file in _files(finished, target):
        file.attrs["model_name"] = finished.about["model"]
        file.attrs["array"] = spec.name
        array = finished.arrays[spec.name]
        for place, (name, id) in enumerate(zip(names, finished.ids, strict=True)):
            residues = slice(finished.starts[place], finished.starts[place + 1])
            values = np.asarray(array[residues] if spec.axis == "residue" else array[place])
            file.create_dataset(name, data=values, track_times=False).attrs["original_id"] = id
            release_pages(array)


def write_scikit_bio(finished: ResultArrays, target: Path) -> None:
    """A file for each array of vectors in scikit-bio's format `embed`, version 1.0, as its reader takes it.

    `embedding` has the vectors end to end, `id` the residues of all proteins as bytes, and `embedding_ptr` and `idptr`
    the ends of each protein in them. Vectors of residues are read as `ProteinEmbedding`, vectors of proteins as
    `ProteinVector`. The dataset is called `embedding`: the format's description says `embeddings`, which the reader
    does not know (`skbio/io/format/embed.py`, 0.7).
    """
    ends = _pointers(finished.starts[1:])
    for spec, file in _files(finished, target):
        if len(spec.row) != 1:
            raise InputError(f"expected vectors for the format scikit-bio, got {spec.name}")
        array = finished.arrays[spec.name]
        attributes = {"format": "embedding", "format-version": "1.0", "dtype": array.dtype.name, "dim": spec.row[0]}
        file.attrs.update(attributes)
        dataset = file.create_dataset("embedding", array.shape, array.dtype, track_times=False)
        for rows in stretches(array):
            dataset[rows] = array[rows]
        letters = file.create_dataset("id", (int(finished.starts[-1]),), np.uint8, track_times=False)
        for start, sequence in zip(finished.starts[:-1], finished.sequences(), strict=True):
            letters[start : start + len(sequence)] = np.frombuffer(sequence.encode("ascii"), np.uint8)
        file.create_dataset("idptr", data=ends, track_times=False)
        vectors = ends if spec.axis == "residue" else _pointers(np.arange(1, len(array) + 1))
        file.create_dataset("embedding_ptr", data=vectors, track_times=False)


def _pointers(ends: NDArray[np.int64]) -> NDArray[np.int32 | np.int64]:
    """Places as int32, which the format names, or as int64 where that is too small."""
    return ends.astype(np.int32 if ends[-1] < 2**31 else np.int64)


def _files(finished: ResultArrays, target: Path) -> Iterator[tuple[ArraySpec, Any]]:
    """Each array's spec and its new file in the folder `target`, with the origin of the results."""
    import h5py

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for spec in finished.specs:
        with h5py.File(target / f"{spec.name.replace('/', '_')}.h5", "w") as file:
            file.attrs.update(finished.about)
            yield spec, file
