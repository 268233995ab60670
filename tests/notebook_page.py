"""Run the `python` blocks of a page as the cells of a notebook: `python notebook_page.py PAGE`.

A block's output is what it prints, then the representation of its last line's value. Where a `text` block follows, the
output is compared with it; `...` there stands for any text. For an environment without the tests' packages, so that it
needs the standard library alone.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import re
import sys
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def output_of(code: str, namespace: dict[str, Any]) -> str:
    """What the cell prints and shows."""
    body = ast.parse(code).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "<cell>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
            if value is not None:
                print(repr(value))
                # a notebook asks for this too
                getattr(value, "_repr_html_", lambda: "")()
    return printed.getvalue()


def main(page: Path) -> int:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = BLOCK.findall(page.read_text(encoding="utf-8"))
    wrong = 0
    for code, expected in cells:
        shown = output_of(code, namespace)
        if expected and not doctest.OutputChecker().check_output(expected, shown, doctest.ELLIPSIS):
            wrong += 1
            print(f"{code}\nexpected:\n{expected}\ngot:\n{shown}")
    print(f"{len(cells)} cells, {wrong} wrong")
    return 1 if wrong or not cells else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
