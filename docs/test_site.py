"""The built site: complete, its links lead somewhere, and a browser needs nothing but its files. Run by `make docs`."""

from __future__ import annotations

import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "docs"
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))
import api_pages  # noqa: E402  # beside this file
import docstrings  # noqa: E402
import sidebar  # noqa: E402

# attributes by which a page makes a browser fetch something by itself, and those that a reader follows
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
FOLLOWED = {"a": "href", **FETCHED}


class Page(HTMLParser):
    """The names of places in a page, and what it refers to: pairs of a tag and an address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.addresses: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {value for name in ("id", "name") if (value := given.get(name))}
        if (address := given.get(FOLLOWED.get(tag, ""))) is not None:
            self.addresses.append((tag, address))


@cache
def read(page: str) -> Page:
    return Page((SITE / page).read_text(encoding="utf-8"))


def is_remote(address: str) -> bool:
    return bool(re.match(r"(?:[a-z][a-z0-9+.-]*:)?//", address, re.IGNORECASE))


def test_the_site_is_there() -> None:
    assert {"index.html", "README.html", "CONTRIBUTING.html", "docs/index.html", "docs/api.html"} <= set(PAGES)
    sources = {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sources <= set(PAGES)


@pytest.mark.parametrize("name", sorted({name for names in api_pages.groups().values() for name in names}))
def test_every_public_name_is_in_the_reference(name: str) -> None:
    place = f"module-{name}" if name == "longlens.shapes" else name
    assert any(place in read(page).places for page in PAGES if page.startswith("docs/api"))


def test_the_names_are_those_of_the_package() -> None:
    import longlens

    known = api_pages.groups()
    at_top = {name.removeprefix("longlens.") for name in known["functions"] + known["methods"] + known["rules"]}
    at_top |= {name.removeprefix("longlens.") for name in known["results"]}
    assert at_top | {"errors", "hf", "lens", "testing"} == set(longlens.__all__)
    assert "longlens.lens.Entropy" in known["lens"]
    assert "longlens.errors.InputError" in known["errors"]
    assert any(name.endswith(".Embeddings") for name in known["returned"])


@pytest.mark.parametrize("page", PAGES)
def test_a_browser_fetches_nothing_from_elsewhere(page: str) -> None:
    remote = [(tag, address) for tag, address in read(page).addresses if tag in FETCHED and is_remote(address)]
    assert remote == []


def test_neither_do_the_style_sheets() -> None:
    sheets = list(SITE.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        text = sheet.read_text(encoding="utf-8")
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?\s*(?:https?:)?//[^)]*", text), sheet


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for _, address in read(page).addresses:
        if is_remote(address) or re.match(r"(?:data|mailto|javascript):", address):
            continue
        path, _, place = address.partition("#")
        target = (SITE / page).parent / unquote(path.partition("?")[0]) if path else SITE / page
        target = target / "index.html" if target.is_dir() else target
        assert target.is_file(), f"{page}: {address}"
        if place and target.suffix == ".html":
            there = read(target.resolve().relative_to(SITE).as_posix()).places
            assert unquote(place) in there, f"{page}: {address}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_show_their_outputs(notebook: Path) -> None:
    text = (SITE / "docs" / "notebooks" / f"{notebook.stem}.html").read_text(encoding="utf-8")
    assert text.count("cell_output") >= 3
    assert "Traceback (most recent call last)" not in text


def test_the_sidebar_has_the_lists_of_the_index() -> None:
    lists = "**First**\n\n- [A](a.md): text\n- [B](../b.md#part), [again](a.md)\n\n## Last\n\n| [`c`](m/c.ipynb) |"
    index = f"# Title\n\n{lists}\n"
    assert sidebar.sections(index) == {"First": ["A <a>", "B <../b>"], "Last": ["c <m/c>"]}


def test_docstrings_keep_formulas_fields_and_signs() -> None:
    text = "Sum of a*b_.\n\n    y = x * 2\n    z = |y|\n\nAfter `a * b`.\n\nfirst: one\n    more\nsecond, third: two"
    assert docstrings.convert(text.split("\n")) == [
        "Sum of a\\*b\\_.", "", "::", "", "    y = x * 2", "    z = |y|", "", "After `a * b`.", "",
        "- `first`: one", "  more", "- `second, third`: two",
    ]  # fmt: skip
    code = "Maps.\n\nmaps = contacts(top=10)\nmaps['a']  # pairs\n\nprose"
    assert docstrings.convert(code.split("\n")) == [
        "Maps.", "", "::", "", "    maps = contacts(top=10)", "    maps['a']  # pairs", "", "prose"
    ]  # fmt: skip
