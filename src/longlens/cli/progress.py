"""Show the events of a job on standard error: a bar on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from longlens.jobs.progress import Notice, ProgressCallback, StageProgress

# seconds between lines if standard error is not a terminal
EVERY = 30.0


@contextmanager
def shown_progress() -> Iterator[ProgressCallback]:
    """A function that shows each event that it receives."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield ProgressLines(sys.stderr)
        return
    with _bar(console) as show:
        yield show


class ProgressLines:
    """Shows notices at once, and progress at most every `every` seconds and at the end of a stage."""

    def __init__(self, file: TextIO, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._every, self._clock = file, every, clock
        self._begun: dict[str, tuple[float, int]] = {}
        self._last = clock()

    def __call__(self, event: StageProgress | Notice, /) -> None:
        """Show an event."""
        from longlens.jobs.progress import Notice

        if isinstance(event, Notice):
            self._write(notice_text(event))
            return
        now = self._clock()
        begun, before = self._begun.setdefault(event.stage, (now, event.done))
        if now - self._last < self._every and event.done < event.total:
            return
        self._last = now
        measured = now > begun and event.done > before
        rate = f", {_rate((event.done - before) / (now - begun))} a second" if measured else ""
        self._write(f"longlens: {event.stage}: {event.done:,} of {event.total:,} {event.unit}{rate}")

    def _write(self, text: str) -> None:
        print(text, file=self._file, flush=True)


def _rate(value: float) -> str:
    """Two digits at least: 1,234, 12, 0.31."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def notice_text(notice: Notice) -> str:
    """A notice as a line."""
    return f"longlens: {'warning: ' if notice.warning else ''}{notice.text}"


@contextmanager
def _bar(console: Any) -> Iterator[ProgressCallback]:
    """A bar with rate and remaining time for each stage."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from longlens.jobs.progress import Notice

    counted = TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.fields[unit]}")
    rate = TextColumn("{task.fields[rate]}")
    columns = [TextColumn("{task.description}"), BarColumn(), counted, rate, TimeElapsedColumn(), TimeRemainingColumn()]
    with Bar(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def show(event: StageProgress | Notice, /) -> None:
            if isinstance(event, Notice):
                bar.console.print(notice_text(event), markup=False, highlight=False)
                return
            if event.stage not in tasks:
                tasks[event.stage] = bar.add_task(
                    event.stage, total=event.total, completed=event.done, rate="", unit=event.unit
                )
            task = next(task for task in bar.tasks if task.id == tasks[event.stage])
            speed = f"{_rate(task.speed)}/s" if task.speed else ""
            bar.update(task.id, completed=event.done, rate=speed)

        yield show
