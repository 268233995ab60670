"""The API reference: a line `<!--- api: GROUP -->` of a page becomes the signatures and docstrings of that group.

The groups are made from the package's own tables of names, so that a new public name is in the reference without
anybody listing it there.
"""

from __future__ import annotations

import inspect
import re
import typing
from importlib import import_module
from types import ModuleType
from typing import Any

import longlens

_MARK = re.compile(r"^<!--- api: (\S+) -->$", re.M)


def groups() -> dict[str, list[str]]:
    """Group -> dotted names, in alphabetical order."""
    public = {name: getattr(longlens, name) for name in longlens.__all__}
    things = {name: value for name, value in public.items() if not isinstance(value, ModuleType)}
    functions = sorted(name for name, value in things.items() if inspect.isfunction(value))
    classes = sorted(set(things) - set(functions))
    home = {name: longlens._HOMES[name] or "" for name in classes}
    rules = ("longlens.ops.masks", "longlens.ops.biases")
    methods = ("longlens.ops.exact", "longlens.ops.sparse", "longlens.ops.approximate")
    found = {
        "functions": functions,
        "methods": [name for name in classes if home[name].startswith(methods)],
        "rules": [name for name in classes if home[name].startswith(rules)],
        "results": [name for name in classes if not home[name].startswith((*rules, *methods))],
    }
    dotted = {group: [f"longlens.{name}" for name in names] for group, names in found.items()}
    dotted["shapes"] = ["longlens.shapes"]
    dotted["returned"] = returned([things[name] for name in functions], things)
    for name, value in public.items():
        if isinstance(value, ModuleType):
            dotted[name] = [f"longlens.{name}.{inner}" for inner in names_of(value)]
    return dotted


def names_of(module: ModuleType) -> list[str]:
    """The public names of a submodule: those of its `__all__`, or all that it defines or passes on as its own."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed)
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return sorted(name for name, value in own.items() if getattr(value, "__module__", "").startswith(module.__name__))


def returned(functions: list[Any], known: dict[str, Any]) -> list[str]:
    """The classes of longlens that public functions return and that are no public names themselves."""
    found = set()
    for function in functions:
        try:
            hint = typing.get_type_hints(function).get("return")
        except NameError:  # a name that is imported for type checkers alone
            hint = _named(function)
        for kind in (hint, *typing.get_args(hint)):
            module = getattr(kind, "__module__", "")
            if inspect.isclass(kind) and module.startswith("longlens.") and kind.__name__ not in known:
                found.add(f"{module}.{kind.__qualname__}")
    return sorted(found, key=lambda name: name.rpartition(".")[2])


def _named(function: Any) -> Any:
    """The class that a return annotation names, looked up where its file imports from for type checkers."""
    word = str(function.__annotations__.get("return", "")).strip("'\"")
    tree = inspect.getsource(import_module(function.__module__))
    for module, names in re.findall(r"from (longlens\S*) import ([^\n]+)", tree):
        if word in re.split(r",\s*", names):
            return getattr(import_module(module), word)
    return None


def directive(name: str) -> str:
    """What Sphinx is to write for a name."""
    if name == "longlens.shapes":
        return f".. automodule:: {name}\n"
    module, _, last = name.rpartition(".")
    value = getattr(import_module(module), last)
    if not inspect.isclass(value):
        return f".. autofunction:: {name}\n"
    if issubclass(value, Exception):
        return f".. autoexception:: {name}\n"
    return f".. autoclass:: {name}\n   :members:\n"


def fill_marks(app: Any, document: str, source: list[str]) -> None:
    """Replace the marks of a page."""
    if not _MARK.search(source[0]):
        return
    known = groups()
    source[0] = _MARK.sub(
        lambda mark: "````{eval-rst}\n" + "\n".join(directive(name) for name in known[mark[1]]) + "````", source[0]
    )


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", fill_marks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
