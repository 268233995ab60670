"""The package's table of contents is complete, sorted and true."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import longlens
from longlens.ops.registry import METHOD_INFOS


def names_for_type_checkers() -> dict[str, str]:
    """Public name -> module, as the `if TYPE_CHECKING` block of the package tells type checkers."""
    tree = ast.parse(Path(longlens.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    found = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            # only `X as X` re-exports
            assert alias.asname == alias.name
            found[alias.name] = str(statement.module)
    return found


def test_all_is_sorted_and_says_what_type_checkers_are_told() -> None:
    assert sorted(longlens.__all__) == list(longlens.__all__)
    assert len(set(longlens.__all__)) == len(longlens.__all__)
    homes = {name: home or "longlens" for name, home in longlens._HOMES.items()}
    assert homes == names_for_type_checkers()


@pytest.mark.parametrize("name", longlens.__all__)
def test_name_resolves_to_the_thing_of_that_name(name: str) -> None:
    found = getattr(longlens, name)
    assert inspect.getdoc(found)
    if isinstance(found, ModuleType):
        assert found.__name__ == f"longlens.{name}"
    else:
        assert found.__name__ == name
        # the home is where the thing is defined, not a module that passes it on
        assert found.__module__ == longlens._HOMES[name]


def test_everything_public_is_listed() -> None:
    for name in longlens.__all__:
        getattr(longlens, name)
    submodules = {
        "cli",
        "diagnosis",
        "finetuning",
        "io",
        "jobs",
        "models",
        "ops",
        "report",
        "shapes",
        "training",
        "watching",
    }
    helpers = {"annotations", "import_module", "PackageNotFoundError", "version", "TYPE_CHECKING", "Any"}
    public = {name for name in vars(longlens) if not name.startswith("_")}
    assert public - submodules - helpers == set(longlens.__all__)
    assert set(dir(longlens)) == {*longlens.__all__, "__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'longlens' has no attribute 'attend'"):
        longlens.attend  # noqa: B018


@pytest.mark.parametrize("entry", METHOD_INFOS, ids=lambda entry: entry.name)
def test_every_method_is_public_and_knows_its_name(entry: longlens.ops.registry.MethodInfo) -> None:
    method = entry.load()
    assert getattr(longlens, method.__name__) is method
    assert method.name == entry.name


def test_method_names_are_unique() -> None:
    assert len({entry.name for entry in METHOD_INFOS}) == len(METHOD_INFOS)
