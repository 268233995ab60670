"""A contact map as a picture."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from longlens.errors import InputError


def draw_contacts(cells: Tensor, residues: int, what: str, model: str, path: Path) -> None:
    """Draw (C, C) `cells`, each the largest probability of its pairs of `residues`, with residues numbered from 1.

    Raises `InputError` without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("expected matplotlib to be installed for figures; install longlens[plot]") from None
    figure = Figure(figsize=(6.4, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    edge = residues + 0.5
    image = ax.imshow(cells.numpy(), cmap="Blues", vmin=0, vmax=1, extent=(0.5, edge, edge, 0.5), interpolation="none")
    width = -(-residues // len(cells))
    each = "" if width == 1 else f"\neach cell the largest of {width} x {width} pairs"
    ax.set_title(f"Predicted contacts: {what}\nmodel {model}{each}", fontsize=9)
    ax.set_xlabel("residue")
    ax.set_ylabel("residue")
    figure.colorbar(image, ax=ax, label="probability of contact", shrink=0.85)
    figure.savefig(path)
