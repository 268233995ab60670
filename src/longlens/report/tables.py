"""Columns as a small HTML table, which notebooks show, and as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from longlens.errors import InputError

# the most rows and the most characters of a cell that a notebook shows
ROWS = 8
LETTERS = 80


def to_frame(columns: Mapping[str, Any]) -> Any:
    """A pandas DataFrame of columns of equal length. Raises `InputError` if pandas is missing."""
    try:
        import pandas as pd
    except ImportError:
        raise InputError(
            "to_frame() needs pandas, which is not installed; pip install 'longlens[notebook]', or use columns()"
        ) from None
    return pd.DataFrame(dict(columns))


def html_table(columns: Mapping[str, Any], *, title: str, total: int, picture: str | None = None) -> str:
    """The first `ROWS` rows under a title, how many of the `total` rows these are, and an HTML `picture`.

    Text is escaped, and long text is cut.
    """
    shown = [list(column[:ROWS]) for column in columns.values()]
    rows = len(shown[0]) if shown else 0
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in zip(*shown, strict=True))
    below = f"<p>{rows:,} of {total:,} rows</p>" if total > rows else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if columns else ""
    return f"<div><p><b>{escape(title)}</b></p>{table}{below}{picture or ''}</div>"


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    text = f"{value:.4g}" if hasattr(value, "is_integer") and not hasattr(value, "bit_count") else str(value)
    return f"<td>{escape(text if len(text) <= LETTERS else text[: LETTERS - 3] + '...')}</td>"
