"""The packages that longlens needs and those of its extras, as its metadata name them, beside what is installed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

# extras for work on longlens itself
DEVELOPMENT = {"bench", "check", "docs", "test"}

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(?P<needs>[^;\[\]]*?)\s*(?:;\s*(?P<marker>.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w.-]+)['\"]")


@dataclass(frozen=True)
class Package:
    """A package: the versions that are needed, such as ">=5.0", and the one that is here; "" if none is.

    `state` is "present", "missing" or "too old".
    """

    name: str
    needs: str
    version: str
    state: str

    def __str__(self) -> str:
        if self.state == "missing":
            return f"{self.name} missing"
        return f"{self.name} {self.version}{f' is too old, needs {self.needs}' if self.state == 'too old' else ''}"


@dataclass(frozen=True)
class Packages:
    """What longlens requires, and what each of its extras adds.

    `required` is empty where longlens is not installed, such as in a source tree on the path: its metadata say what it
    needs.
    """

    required: tuple[Package, ...]
    extras: dict[str, tuple[Package, ...]]


def find_packages() -> Packages:
    """The packages of this installation. Nothing is imported."""
    try:
        lines = requires("longlens") or []
    except PackageNotFoundError:
        lines = []
    required: list[Package] = []
    extras: dict[str, list[Package]] = {}
    for line in lines:
        match = _REQUIREMENT.fullmatch(line)
        if match is None:
            # a package with extras of its own, which only those for development name
            continue
        package = inspect_package(match["name"], match["needs"])
        of = _EXTRA.findall(match["marker"] or "")
        for extra in of:
            extras.setdefault(extra, []).append(package)
        if not of:
            required.append(package)
    served = {name: tuple(found) for name, found in sorted(extras.items()) if name not in DEVELOPMENT}
    return Packages(tuple(required), served)


def inspect_package(name: str, needs: str) -> Package:
    """The package as it is installed."""
    have = installed_version(name)
    if not have:
        return Package(name, needs, "", "missing")
    floors = re.findall(r">=\s*([\d.]+)", needs)
    old = any(_numbers(have) < _numbers(floor) for floor in floors)
    return Package(name, needs, have, "too old" if old else "present")


def installed_version(name: str) -> str:
    """The version of a package, "" if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def install_command(packages: Iterable[Package]) -> str:
    """The command that installs these packages in the versions that are needed."""
    return "pip install " + " ".join(f"'{package.name}{package.needs}'" for package in packages)


def _numbers(text: str) -> list[int]:
    """ "2.13.0+cpu" -> [2, 13]: zeros at the end count for nothing."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in match.group().split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers
