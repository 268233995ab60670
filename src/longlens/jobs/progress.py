"""The events of a running job, progress and notices, and the callback that receives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


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


def silent(event: StageProgress | Notice, /) -> None:
    """Show nothing."""
