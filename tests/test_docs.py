"""The code blocks of the README and of docs/ run and print what the page says.

One test to a page, its blocks in order in one namespace. `python` blocks are run, and `>>>` lines compared as doctest
does (`...` stands for anything). Of `console` blocks the `$ longlens` commands are run and their output compared; other
commands are for the reader. A block after `<!--- skip: next -->` is left alone, and so is what
follows `<!--- skip: start -->`.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import longlens

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SHELL_ONLY = ("git", "make", "pip", "python")


def run_console(example: Example) -> str | None:
    """Run each `$ longlens` command of a console block; the difference from what it says it prints, or None."""
    for session in ("\n" + example.parsed.rstrip()).split("\n$ ")[1:]:
        command, _, expected = session.partition("\n")
        program, *arguments = shlex.split(command, comments=True)
        if program != "longlens":
            if program not in SHELL_ONLY:
                return f"neither run nor known: $ {command}"
            continue
        run = subprocess.run(
            [Path(sys.executable).with_name("longlens"), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            env={**os.environ, "COLUMNS": "120"},
        )  # fmt: skip
        if difference := differs(expected, run.stdout):
            return f"$ {command}\n{difference}"
    return None


def differs(expected: str, got: str) -> str | None:
    """What differs, with `...` for any text, and blanks at the ends of lines left out of account."""
    want, have = ("\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n" for text in (expected, got))
    checker = doctest.OutputChecker()
    if checker.check_output(want, have, doctest.ELLIPSIS):
        return None
    return checker.output_difference(doctest.Example("", want), have, doctest.REPORT_UDIFF)


SYBIL = Sybil(
    parsers=[
        PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS),
        CodeBlockParser(language="console", evaluator=run_console),
        SkipParser(),
    ],
    path=str(ROOT),
)


def parse(page: Path) -> Document:
    return SYBIL.parse(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs_as_it_says(page: Path) -> None:
    for example in parse(page).examples():
        example.evaluate()


def test_something_is_found_on_the_main_pages() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "tutorial.md"):
        assert len(list(parse(page).examples())) >= 3, page


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("```python\nraise ValueError('broken')\n```\n", "broken"),
        ("```python\n>>> 1 + 1\n3\n```\n", "Got:"),
        ("```console\n$ longlens --version\nlonglens, version 99\n```\n", "version 99"),
        ("```console\n$ longlens nosuch\n```\n", "No such command"),
        ("```console\n$ longlense methods\n```\n", "neither run nor known"),
    ],
)
def test_a_page_that_is_wrong_is_found(tmp_path: Path, block: str, said: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{block}")
    with pytest.raises(Exception, match=said):
        test_page_runs_as_it_says(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            assert heading in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(notebook: Path) -> None:
    """They are run by `make docs`; stored outputs would grow old, and hide what changed in a diff."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 3
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"]] == []


def outside_code(page: Path) -> str:
    return "".join(page.read_text().split("```")[::2])


def anchors(page: Path) -> set[str]:
    """What links name the headings of a page by, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", outside_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_file_tree_of_the_readme_is_the_tree() -> None:
    block = (ROOT / "README.md").read_text().partition("## Files")[2].split("```")[1]
    named = set(re.findall(r"(?<![\w/])(\w+\.py|\w+/)(?=[\s,;]|$)", block, re.MULTILINE))
    there = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "src").rglob("*")}
    top = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir()} | {"methods.py", "harness/"}
    assert named <= there | top
    package = ROOT / "src" / "longlens"
    wanted = [*package.glob("*.py"), *package.glob("ops/*.py"), *package.glob("*/__init__.py")]
    modules = {f"{path.parent.name}/" if path.name == "__init__.py" else path.name for path in wanted}
    assert modules - {"longlens/", "ops/", "__main__.py"} <= named


TAGLINE = (
    "Transformers over long proteins and texts in memory linear in their length, with a lens that shows what they "
    "attend to and how surprised they are"
)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/index.md", "pyproject.toml", "src/longlens/__init__.py", "src/longlens/cli/main.py"]
)
def test_the_tagline_is_the_same_everywhere(page: str) -> None:
    assert TAGLINE in " ".join((ROOT / page).read_text().split())


def test_the_results_that_the_page_on_proteins_reads_are_there(tmp_path, monkeypatch):
    """That block is skipped, since its results come from the reader's own file."""
    page = (ROOT / "docs" / "proteins.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "open_results" in code]
    monkeypatch.chdir(tmp_path)
    # the command at the top of the page
    assert "longlens embed proteins.fasta.gz -o results/ --include mean surprise" in page
    longlens.embed("MKTAYIAKQRQISFVKSHFS", output="results", include=["mean", "surprise"])
    exec(compile(block, "docs/proteins.md", "exec"), {})
