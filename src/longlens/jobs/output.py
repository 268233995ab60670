"""The output folder of a job: one that the user named, or a temporary one that exists as long as its result object."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputFolder:
    """A folder of results. A temporary folder is removed when nothing refers to this object any more."""

    def __init__(self, path: str | Path | None) -> None:
        self.temporary = path is None
        self.path = Path(tempfile.mkdtemp(prefix="longlens-")) if path is None else Path(path)
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True) if path is None else None

    def discard(self) -> None:
        """Remove the folder now if it is temporary."""
        if self._remove is not None:
            self._remove()


@contextmanager
def output_folder(path: str | Path | None) -> Iterator[OutputFolder]:
    """The folder for a job; a temporary one (None) is removed if the job fails."""
    folder = OutputFolder(path)
    try:
        yield folder
    except BaseException:
        folder.discard()
        raise
