"""What commands print of their numbers: a table on standard output, a summary where it is in nobody's way."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import click


def print_results(data: bytes, lines: Iterable[tuple[str, str]], output: Path | None) -> None:
    """Print the summary's lines on standard output; where there is no `output`, the table goes there (`data`) and the
    summary to standard error."""
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    more = [] if output is None else [("results", str(output))]
    for name, value in [*lines, *more]:
        click.echo(f"{name:<14} {value}", err=output is None)


def number(value: float | None, digits: int) -> str:
    """A number of a summary, or "-" for one that does not exist."""
    return "-" if value is None else f"{value:.{digits}f}"


def counted(count: int, name: str, plural: str = "s") -> str:
    """A number of things, with their name."""
    return f"{count:,} {name}{'' if count == 1 else plural}"


def nats(mean: float | None, error: float | None) -> str:
    """A mean with its standard error, where that is known."""
    return f"{number(mean, 4)}{'' if error is None else f' +- {error:.4f}'} nats"
