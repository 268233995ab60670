"""The events of a running job, progress and notices, and the callback that receives them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Protocol

from longlens.errors import LonglensWarning


@dataclass(frozen=True)
class StageProgress:
    """`done` of `total` (counted in `unit`: residues, positions, sequences) in one stage of a job."""

    stage: str
    done: int
    total: int
    unit: str = "residues"

    def __str__(self) -> str:
        return f"{self.stage}: {self.done:,} of {self.total:,} {self.unit}"


@dataclass(frozen=True)
class Notice:
    """One sentence for the user: the model in use, a doubtful input, the unit from which a job continues."""

    text: str
    warning: bool = False

    def __str__(self) -> str:
        return f"warning: {self.text}" if self.warning else self.text


class ProgressCallback(Protocol):
    """Receives the events of a job as they happen."""

    def __call__(self, event: StageProgress | Notice, /) -> None: ...


def only_warnings(event: StageProgress | Notice, /) -> None:
    """Pass warnings on to Python's `warnings`, and show nothing else: the default of the functions."""
    if isinstance(event, Notice) and event.warning:
        warnings.warn(event.text, LonglensWarning, stacklevel=2)
