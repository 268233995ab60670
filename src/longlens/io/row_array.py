"""Arrays on disk that grow row by row: written in place and synced, so that a killed process loses no finished rows.

They are never memory-mapped for writing: on a full disk, a mapped file kills the process and a written one raises.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class RowArray:
    """Rows of one shape and dtype in a raw file. Rows may be written in any order and more than once."""

    def __init__(self, path: Path, dtype: str, row: tuple[int, ...]) -> None:
        self.path, self.dtype, self.row = path, np.dtype(dtype), row
        self._width = self.dtype.itemsize * int(np.prod(row, dtype=np.int64))
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def write(self, start: int, rows: NDArray[np.generic]) -> None:
        """Write `rows` from row `start` on. Raises `OSError` (a full disk); rows that were there before stay."""
        data = np.ascontiguousarray(rows, dtype=self.dtype)
        assert data.shape[1:] == self.row
        view, place = data.reshape(-1).view(np.uint8).data, start * self._width
        while view:
            written = os.pwrite(self._file, view, place)
            view, place = view[written:], place + written

    def sync(self) -> None:
        """Flush the rows to the disk."""
        os.fsync(self._file)

    def read(self, count: int) -> NDArray[np.generic]:
        """The first `count` rows, mapped read-only."""
        if count == 0 or self._width == 0:
            return np.empty((count, *self.row), self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(count, *self.row))

    def close(self) -> None:
        """Close the file; its rows stay."""
        os.close(self._file)
