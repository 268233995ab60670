"""Imports among the benchmarks: no circle, and the harness below everything; import-linter sees the package only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(root: Path) -> dict[str, set[str]]:
    """Every module under `root` and the modules there that it imports, at its top or inside a function."""
    files = {module_name(path, root): path for path in root.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                # `from package import module` reaches the module, not only the package
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= below & files.keys() or {node.module}
        found[name] = (wanted & files.keys()) - {name}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first one again at the end; empty where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            ring = walk(other, [*path, name])
            if ring:
                return ring
        done.add(name)
        return []

    return next((ring for name in sorted(graph) if (ring := walk(name, []))), [])


def test_benchmarks_import_each_other_in_no_circle() -> None:
    graph = imports_of(BENCHMARKS)
    assert "harness" in graph["run"]
    assert circle(graph) == []


def test_the_harness_and_the_gpu_steps_stand_below_the_themes() -> None:
    graph = imports_of(BENCHMARKS)
    for name, wanted in graph.items():
        allowed = {"harness": ("harness",), "gpu_steps": ("harness", "gpu_steps", "checkpoints")}.get(
            name.split(".")[0]
        )
        if allowed is not None:
            assert all(other.split(".")[0] in allowed for other in wanted), (name, wanted)


@pytest.mark.parametrize(
    ("run", "claims", "ring"),
    [
        ("import claims", "import os", []),
        ("import claims", "def f():\n    from run import Results", ["claims", "run", "claims"]),
        ("from parts import claims", "import run", []),
        ("from parts.claims import x", "import run", []),
    ],
)
def test_a_circle_is_found(tmp_path: Path, run: str, claims: str, ring: list[str]) -> None:
    (tmp_path / "run.py").write_text(run)
    (tmp_path / "claims.py").write_text(claims)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "claims.py").write_text("")
    assert circle(imports_of(tmp_path)) == ring


def test_a_circle_through_a_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("from parts.one import x")
    (tmp_path / "parts" / "one.py").write_text("import two")
    (tmp_path / "two.py").write_text("import parts")
    assert circle(imports_of(tmp_path)) == ["parts", "parts.one", "two", "parts"]
