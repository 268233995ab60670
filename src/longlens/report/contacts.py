"""The figure of a contact map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from longlens.report.figures import new_figure

if TYPE_CHECKING:
    from longlens.report.figures import Figure

# rows and columns of the map in a figure, at most
CELLS = 1000


def draw_contacts(cells: ArrayLike, residues: int, subject: str, model: str) -> Figure:
    """The figure of (C, C) `cells`, each the largest probability of its pairs of `residues`, with residues numbered
    from 1.

    Raises `InputError` if matplotlib is missing.
    """
    cells = np.asarray(cells)
    figure = new_figure((6.4, 5.4))
    ax = figure.add_subplot()
    edge = residues + 0.5
    image = ax.imshow(cells, cmap="Blues", vmin=0, vmax=1, extent=(0.5, edge, edge, 0.5), interpolation="none")
    width = -(-residues // len(cells))
    each = "" if width == 1 else f"\neach cell the largest of {width} x {width} pairs"
    ax.set_title(f"Predicted contacts: {subject}\nmodel {model}{each}", fontsize=9)
    ax.set_xlabel("residue")
    ax.set_ylabel("residue")
    figure.colorbar(image, ax=ax, label="probability of contact", shrink=0.85)
    return figure
