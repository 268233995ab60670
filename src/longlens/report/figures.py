"""What all figures share: new figures, text that stays text, and files with the same bytes every time.

Needs matplotlib (extra `plot`), which is imported in `longlens.report` alone. Figures are made without pyplot, so that
no global state changes; `new_axes` is the exception, for notebooks and scripts that show their figures.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlens.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

FORMATS = ("png", "svg")
DOTS = 150
# inches; small type can be read when the figure is shown 800 points wide
WIDTH = 8.0


def has_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise `InputError` if matplotlib is missing."""
    if not has_matplotlib():
        raise InputError(
            "figures need matplotlib, which is not installed; pip install 'longlens[plot]', or go without figures "
            "(look and context: --no-figures)"
        )


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure of a size in inches, made without pyplot. Raises `InputError` if matplotlib is missing."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def new_axes(count: int = 1) -> Any:
    """Axes of a new pyplot figure, which a notebook shows; for `count` above 1 an array of panels, at most four beside
    one another. Raises `InputError` if matplotlib is missing."""
    require_matplotlib()
    from matplotlib import pyplot as plt

    if count == 1:
        return plt.subplots(layout="constrained")[1]
    wide = min(4, count)
    tall = -(-count // wide)
    _, panels = plt.subplots(tall, wide, figsize=(4 * wide, 3 * tall), squeeze=False, layout="constrained")
    for panel in panels.flat[count:]:
        panel.set_axis_off()
    return panels


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write `name`.png and `name`.svg; the same figure gives the same bytes.

    Characters that no font has are boxes in the PNG; one warning lists them.
    """
    import matplotlib as mpl

    paths = [folder / f"{name}.{kind}" for kind in formats]
    # text stays text, so that it can be edited and searched
    with (
        mpl.rc_context({"svg.hashsalt": "longlens", "svg.fonttype": "none"}),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for path in paths:
            figure.savefig(path, dpi=DOTS, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    missing = set()
    for warning in caught:
        glyph = re.match(r"Glyph (\d+) .*missing", str(warning.message))
        if glyph:
            missing.add(int(glyph[1]))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if missing:
        signs = " ".join(map(chr, sorted(missing)))
        warnings.warn(
            f"no font that matplotlib finds has {signs}: they are boxes in the PNG and text in the SVG", stacklevel=2
        )
    return paths


def inline(figure: Figure, dots: int = 80) -> str:
    """The figure as an HTML image with the PNG inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots, metadata={"Software": None})
    return f'<img alt="figure" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def plain(text: str) -> str:
    """Text in which matplotlib reads no formula, which "$" would begin."""
    return text.replace("$", r"\$").replace("\n", "\\n").strip() or "(blank)"


def span(numbers: Sequence[int]) -> str:
    """0-5, or 0, 3, 5."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))
