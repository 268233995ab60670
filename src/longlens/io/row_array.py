"""Arrays on disk that grow row by row and survive being killed: written in place, synced, never mapped for writing.

A mapped file on a full disk kills the process; a written one raises.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class RowArray:
    """Rows of one shape and dtype in a raw file. Rows may be written in any order, again and again."""

    def __init__(self, path: Path, dtype: str, row: tuple[int, ...]) -> None:
        self.path, self.dtype, self.row = path, np.dtype(dtype), row
        self._width = self.dtype.itemsize * int(np.prod(row, dtype=np.int64))
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def write(self, start: int, rows: NDArray[np.generic]) -> None:
        """Put `rows` at `start`. Raises `OSError` (a full disk) with what was there before still there."""
        data = np.ascontiguousarray(rows, dtype=self.dtype)
        assert data.shape[1:] == self.row
        view, place = data.reshape(-1).view(np.uint8).data, start * self._width
        while view:
            written = os.pwrite(self._file, view, place)
            view, place = view[written:], place + written

    def sync(self) -> None:
        """Have the rows on the disk before going on."""
        os.fsync(self._file)

    def read(self, count: int) -> NDArray[np.generic]:
        """The first `count` rows, mapped read-only."""
        if count == 0 or self._width == 0:
            return np.empty((count, *self.row), self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(count, *self.row))

    def close(self) -> None:
        """Close the file; its rows stay."""
        os.close(self._file)
