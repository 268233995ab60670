"""Pages of the docs: text between marks, tables, figures in their units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.machine import GIB, HERE

DOCS = HERE.parent / "docs"
MIB = 2**20


def fill(page: Path, maker: str, text: str) -> None:
    """Put text between the marks `<!-- made by benchmarks/MAKER -->` and `<!-- end -->` of a page."""
    start, end = f"<!-- made by benchmarks/{maker} -->", "<!-- end -->"
    before, mark, rest = page.read_text().partition(start)
    if not mark or end not in rest:
        raise ValueError(f"{page.name}: expected the marks '{start}' and '{end}', found none")
    page.write_text(f"{before}{start}\n\n{text.strip()}\n\n{end}{rest.split(end, 1)[1]}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others figures."""
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---'] + ['---:'] * (len(head) - 1))}|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def show_seconds(value: float) -> str:
    """Seconds in the unit that suits them."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1000:.1f} ms" if value >= 0.001 else f"{value * 1e6:.0f} us"


def show_bytes(value: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.1f} MiB"


def show_ratio(row: Mapping[str, Any]) -> str:
    """A ratio and its range: "1.31x (1.24 to 1.40)"."""
    return f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
