"""Small tables for notebooks, and pandas where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from longlens.errors import InputError


def html_table(columns: Mapping[str, Sequence[Any]], caption: str, most: int = 10) -> str:
    """The first rows of columns of one length as an HTML table, with the number of rows that are not shown."""
    count = max(map(len, columns.values()), default=0)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(_shown(values[row]))}</td>" for values in columns.values()) + "</tr>"
        for row in range(min(count, most))
    )
    rest = f"<p>and {count - most:,} more rows</p>" if count > most else ""
    return f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>{rows}</table>{rest}"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def require_pandas() -> Any:
    """The module; raises `InputError` naming the extra where it is not installed."""
    try:
        import pandas as pd
    except ImportError:
        raise InputError("expected pandas to be installed for a data frame; install longlens[notebook]") from None
    return pd
