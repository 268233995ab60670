"""Files of finished results, read back: one error for what libraries raise where a file was removed, cut off or
changed."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longlens.errors import InputError, LonglensError

# of pyarrow, h5py, NumPy and Zarr, whose decoders raise a RuntimeError
_FAULTS = (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
           pa.ArrowException)  # fmt: skip


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Turn what a library raises for a file of results that is not as it was written into an `InputError`."""
    try:
        yield
    except LonglensError:
        raise
    except _FAULTS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: expected it as longlens wrote it, it cannot be read ({reason}); it was removed, cut off or "
            "changed since: run the command that made it again, with a new output"
        ) from error


def read_stored_table(path: Path) -> pa.Table:
    """A Parquet table of results. Raises `InputError` if it is not as it was written."""
    with undamaged(path):
        return pq.read_table(path)


def open_stored_npz(path: Path) -> Any:
    """The arrays of a NumPy archive of results, to be closed. Raises `InputError` if it is not as it was written."""
    with undamaged(path):
        # np.load leaves other files open when it fails
        if path.is_file() and not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no NumPy archive")
        return np.load(path)
