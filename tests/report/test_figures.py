"""Figures without matplotlib, figures inside a page, and words that matplotlib would take for formulas."""

from __future__ import annotations

import base64

import pytest

from longlens.errors import InputError
from longlens.report import figures

pytest.importorskip("matplotlib")


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not figures.has_matplotlib()
    for use in (figures.require_matplotlib, figures.new_axes, lambda: figures.new_figure((1, 1))):
        with pytest.raises(InputError, match=r"longlens\[plot\]"):
            use()


def test_a_figure_stands_in_a_page_as_a_picture():
    page = figures.inline(figures.new_figure((1, 1)))
    before, _, code = page.removesuffix('">').partition("base64,")
    assert before.startswith('<img alt="figure" src="data:image/png;')
    assert base64.b64decode(code).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("numbers", "words"), [((0, 1, 2, 3), "0-3"), ((0, 1), "0, 1"), ((0, 2, 5), "0, 2, 5"), ((7,), "7"), ((), "")]
)
def test_numbers_in_a_row_are_a_span(numbers, words):
    assert figures.span(numbers) == words


def test_formulas_and_blanks_are_plain():
    assert figures.plain("$x$") == r"\$x\$"
    assert figures.plain(" ") == "(blank)"
