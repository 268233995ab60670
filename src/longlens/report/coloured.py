"""Residues or words on coloured ground, as HTML without scripts: a number for each, light where it is small."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike

# residues in a line, and lines that are shown
LINE = 60
LINES = 10
# values beyond this quantile share the darkest ground
SHARE = 0.98
# the ground of the largest value, red, green, blue: dark text on it can still be read
DARKEST = (240, 128, 96)


def coloured_html(labels: Sequence[str], values: ArrayLike, *, name: str, first: int = 1) -> str:
    """Labels, each on a ground that is the darker the larger its value is; the value is shown where the mouse rests.

    Args:
        labels: one letter for each residue, or words; at most `LINE` * `LINES` are shown.
        values: one for each label; NaN has no colour.
        name: what the values are.
        first: number of the first label, for the numbers at the lines.
    """
    numbers = np.asarray(values, np.float64)
    finite = numbers[np.isfinite(numbers)]
    low, high = (float(finite.min()), float(np.quantile(finite, SHARE))) if finite.size else (0.0, 1.0)
    lines = []
    shown = min(len(labels), LINE * LINES)
    for start in range(0, shown, LINE):
        stop = min(start + LINE, shown)
        cells = "".join(
            _cell(labels[place], numbers[place], low, high, f"{place + first}") for place in range(start, stop)
        )
        lines.append(f"{str(start + first).rjust(6)} {cells}")
    rest = f"<p>{shown:,} of {len(labels):,}</p>" if shown < len(labels) else ""
    scale = f"<p>{escape(name)}, from {low:.3g} (no colour) to {high:.3g} and more</p>" if finite.size else ""
    return f'<div>{scale}<pre style="line-height:1.5;white-space:pre-wrap">{chr(10).join(lines)}</pre>{rest}</div>'


def _cell(label: str, value: float, low: float, high: float, place: str) -> str:
    # a line feed in a token would break the line
    label = label.replace("\n", " ")
    if not np.isfinite(value):
        return f"<span>{escape(label)}</span>"
    share = min(1.0, (value - low) / (high - low)) if high > low else 0.0
    colour = ",".join(str(round(255 - share * (255 - part))) for part in DARKEST)
    style = f"background:rgb({colour});color:#000"
    return f'<span style="{style}" title="{escape(label)} {place}: {value:.3g}">{escape(label)}</span>'
