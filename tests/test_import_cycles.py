"""Imports inside the package: no cycle of modules, and no module that only a string names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import longlens

PACKAGE = Path(longlens.__file__).parent
# the package's table of contents, the registry of methods and the table of commands import modules by their names;
# the conformance suite imports the function that its user names
BY_STRING = {"longlens", "longlens.cli.main", "longlens.ops.registry", "longlens.testing.memory"}
REFERENCE = re.compile(r"longlens(\.\w+)+(:\w+)?")


def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module of the package, by its name."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("longlens", *path.relative_to(PACKAGE).with_suffix("").parts)
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return trees


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """The modules that each module imports, at its top, inside functions, and for type checking alone."""
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        imported: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module, f"{name}: relative imports are not used in longlens"
                # `from package import module` imports the module; `from module import name` imports the module
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & trees.keys()
                imported |= submodules or {node.module}
        graph[name] = imported & trees.keys()
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a ring; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def strings(tree: ast.Module) -> Iterator[str]:
    """The string literals of a module that name a module of longlens, or something in one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and REFERENCE.fullmatch(node.value):
            yield node.value


def test_no_modules_import_each_other_in_a_cycle() -> None:
    graph = import_graph(modules())
    assert len(graph) > 100
    assert graph["longlens.ops.tiles.engine"]
    assert cycle(graph) == []


def test_a_cycle_is_noticed() -> None:
    graph = import_graph(modules())
    graph["longlens.errors"] = {"longlens.jobs.embed"}
    assert {"longlens.errors", "longlens.jobs.embed"} <= set(cycle(graph))


def test_modules_are_imported_by_statements_that_the_linter_sees() -> None:
    for name, tree in modules().items():
        called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        called |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert name in BY_STRING or not called & {"import_module", "__import__"}, name


def test_no_string_names_a_module_of_longlens() -> None:
    trees = modules()
    for name, tree in trees.items():
        named = {text for text in strings(tree) if text.partition(":")[0] in trees or ":" in text}
        assert name in BY_STRING or not named, (name, named)
