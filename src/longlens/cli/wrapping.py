"""Lines of a label and a text, within the width of the terminal."""

from __future__ import annotations

import shutil
import textwrap

# the column at which the text of a line begins
INDENT = 10


def wrap_lines(text: str) -> str:
    """Wrap lines to the terminal's width, at most 120, and indent the continuation to the column of the text."""
    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    return "\n".join(
        "\n".join(textwrap.wrap(line, width, subsequent_indent=" " * INDENT, break_on_hyphens=False))
        for line in text.splitlines()
    )
