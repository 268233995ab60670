"""Tables for notebooks: short, escaped, and honest about what is left out."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from longlens.errors import InputError
from longlens.report.tables import ROWS, html_table, to_frame


def test_text_is_escaped_and_cut():
    page = html_table({"<id>": ["<script>alert(1)</script>", "A" * 500], "n": [1, None]}, title="a & b", total=2)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<th>&lt;id&gt;</th>" in page
    assert "<b>a &amp; b</b>" in page
    assert "A" * 81 not in page
    assert "A..." in page
    assert "<td></td>" in page
    assert "rows</p>" not in page


def test_only_the_first_rows_are_shown_and_counted():
    page = html_table(
        {"x": np.arange(10_000), "y": np.linspace(0, 1, 10_000, dtype=np.float32)}, title="t", total=10_000
    )
    assert page.count("<tr>") == 1 + ROWS
    assert f"<p>{ROWS} of 10,000 rows</p>" in page
    assert "<td>7</td><td>0.0007001</td>" in page


def test_an_empty_table_is_a_title():
    assert html_table({}, title="nothing", total=0) == "<div><p><b>nothing</b></p></div>"


def test_a_frame_or_the_extra_that_it_needs(monkeypatch):
    frame = to_frame({"a": np.arange(3), "b": ["x", "y", "z"]})
    assert frame.shape == (3, 2)
    assert list(frame["b"]) == ["x", "y", "z"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"longlens\[notebook\]"):
        to_frame({"a": [1]})
