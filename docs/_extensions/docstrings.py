"""Docstrings for Sphinx: ours are plain text, in which an indented paragraph is a formula or code.

reStructuredText takes an indented paragraph for a quotation, joins its lines, and gives `*`, `|` and `_` a meaning.
Here such a paragraph becomes a literal block, and these signs are escaped where they are not code.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from docutils import nodes

# what napoleon makes lists of
_SECTION = re.compile(r"(Args|Arguments|Attributes|Examples?|Notes?|Raises|Returns|Warns|Yields):$")
_CODE = re.compile(r"(``?[^`]+``?)")


# fields of a class, one a line, in a paragraph of their own
_FIELD = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)*): (?=\S)")


def is_code(paragraph: list[str]) -> bool:
    """Whether a paragraph is Python: prose and formulas do not parse, or do nothing."""
    try:
        body = ast.parse("\n".join(paragraph)).body
    except SyntaxError:
        return False
    acts = (ast.Call, ast.Import, ast.ImportFrom, ast.Subscript)
    return all(any(isinstance(node, acts) for node in ast.walk(statement)) for statement in body)


def mark_paragraphs(lines: list[str]) -> list[str]:
    """Paragraphs of fields as lists, and those of code, which stand at the margin, indented as formulas are."""
    out: list[str] = []
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
            continue
        margin = [one for one in paragraph if not one.startswith(" ")]
        if len(margin) > 1 and all(map(_FIELD.match, margin)):
            # what continues a field stands below its name
            paragraph = [
                _FIELD.sub(r"- `\1`: ", one, count=1) if one in margin else f"  {one.strip()}" for one in paragraph
            ]
        elif paragraph and margin and is_code(paragraph):
            paragraph = [f"    {one}" for one in paragraph]
        out += [*paragraph, line]
        paragraph = []
    return out[:-1]


def convert(lines: list[str]) -> list[str]:
    """The lines as reStructuredText."""
    lines = mark_paragraphs(lines)
    out: list[str] = []
    section = literal = False
    for place, line in enumerate(lines):
        text = line.strip()
        indented = line.startswith("    ")
        after_blank = place > 0 and not lines[place - 1].strip()
        if text and not indented:
            section, literal = bool(_SECTION.match(line)), False
        if text and indented and after_blank and not section and not literal:
            out += ["::", ""]
            literal = True
        # what follows a literal block without a blank line would belong to it
        if text and not indented and out and out[-1].startswith("    ") and not section and "::" in out:
            out.append("")
        out.append(line if literal and indented else escape(line))
    return out


def escape(line: str) -> str:
    """Escape the signs of markup outside code."""
    parts = _CODE.split(line)
    return "".join(
        part if place % 2 else re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part) for place, part in enumerate(parts)
    )


def convert_docstring(app: Any, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Convert in place, before napoleon does."""
    lines[:] = convert(lines)


def convert_signature(app: Any, what: str, name: str, thing: object, options: object, signature: str | None,
                      returns: str | None) -> tuple[str | None, str | None]:  # fmt: skip
    """A default that a factory makes is no Python expression, by which a long signature would stay one line."""
    return signature and signature.replace("<factory>", "..."), returns


def name_with_colons(app: Any, doctree: Any) -> None:
    """Sphinx puts two hyphens between the name of a parameter and its text; a colon, as in the docstring."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(": "))


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)
    app.connect("autodoc-process-signature", convert_signature)
    app.connect("doctree-read", name_with_colons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
