"""The sidebar, made from the lists of docs/index.md: a caption for each bold line, an entry for each link below it.

Sphinx wants a `toctree`, which GitHub would show as code. So it is appended when the page is read. A page of docs/ that
the index does not list is a warning of Sphinx, and so an error of the build.
"""

from __future__ import annotations

import re
from typing import Any

INDEX = "docs/index"
# a heading, a line in bold, or the target of a link to a page
_PARTS = re.compile(
    r"^\*\*(?P<bold>[^*]+)\*\*$"
    r"|^#+ (?P<heading>.+)$"
    r"|\[(?P<text>[^\]]+)\]\((?P<link>[^)#\s]+\.(?:md|ipynb))(?:#[^)]*)?\)",
    re.MULTILINE,
)


def sections(index: str) -> dict[str, list[str]]:
    """Caption -> entries, in order, each page once: the text of its link, and its path without suffix."""
    found: dict[str, list[str]] = {}
    caption, seen = "", set()
    for part in _PARTS.finditer(index):
        caption = part["bold"] or part["heading"] or caption
        if part["link"] and part["link"] not in seen:
            seen.add(part["link"])
            found.setdefault(caption, []).append(f"{part['text'].strip('`')} <{part['link'].rpartition('.')[0]}>")
    return found


def append_toctrees(app: Any, document: str, source: list[str]) -> None:
    """Append a hidden table of contents to the index."""
    if document != INDEX:
        return
    for caption, pages in sections(source[0]).items():
        entries = "\n".join(pages)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", append_toctrees)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
