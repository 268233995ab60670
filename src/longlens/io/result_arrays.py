"""A job's raw arrays as the writers of final files receive them, copied a stretch of rows at a time."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.io.results import ArraySpec

ABOUT = "about/"
# bytes copied at a time
STRETCH = 2**24


@dataclass(frozen=True)
class ResultArrays:
    """Raw arrays, memory-mapped; protein i has the residues [starts[i], starts[i + 1]).

    `about`: the model and the versions, as names and texts. `sequences()`: the proteins' residues, read again.
    """

    specs: list[ArraySpec]
    arrays: Mapping[str, NDArray[Any]]
    starts: NDArray[np.int64]
    ids: list[str]
    about: Mapping[str, str]
    sequences: Callable[[], Iterator[str]] = lambda: iter(())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Residues of each protein."""
        return np.diff(self.starts)


def stretches(array: NDArray[Any]) -> Iterator[slice]:
    """Ranges of rows of `STRETCH` bytes; what was read of a mapped array is released before the next."""
    rows = max(1, STRETCH // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield slice(start, min(start + rows, len(array)))
        release_pages(array)


def release_pages(array: NDArray[Any]) -> None:
    """Release the pages of a mapped array that were read: until then they count as memory of the process."""
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, such that each occurs once: of equal ones, all but the first get _2, _3, ... in their order."""
    taken, numbers = set(names), Counter[str]()
    unique = []
    for name in names:
        numbers[name] += 1
        if numbers[name] == 1:
            unique.append(name)
            continue
        while f"{name}_{numbers[name]}" in taken:
            numbers[name] += 1
        unique.append(f"{name}_{numbers[name]}")
        taken.add(unique[-1])
    return unique
