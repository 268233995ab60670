"""What a method of attention is: a small frozen value object with a string form.

A method is a frozen dataclass whose fields are its parameters. It says what it computes (`attend`), and, beside it, the
same thing by its definition, quadratic and short (`reference`), which the tests compare with.

String form, for command lines: the registered name, then its parameters, positional or named, in field order.

    window:256    window:left=256,right=0    performer:features=256    longformer:128,global_tokens=(0,)

`str(method)` prints the shortest such form, and `longlens.parse_method` reads it back to an equal object.
"""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from longlens.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor

    from longlens.ops.inputs import Inputs
    from longlens.ops.outputs import AttentionOutput
    from longlens.ops.tiles.grid import Tile, TileShape


class Tiled(NamedTuple):
    """A method's tiles, and the inputs that they number (LSH gives every query head keys of its own)."""

    inputs: Inputs
    tiles: Iterator[Tile]


class Method(ABC):
    """One way to compute attention. Subclasses are final frozen dataclasses, one to a file."""

    name: ClassVar[str]

    @abstractmethod
    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Compute attention on checked inputs (one sequence to a batch row: packing is resolved before)."""

    def attend_packed(self, inputs: Inputs) -> AttentionOutput | None:
        """Compute attention on all sequences of a pack at once; None where they have to run one after the other."""
        return None

    @abstractmethod
    def reference(self, inputs: Inputs) -> Tensor:
        """The same result by definition, in N x N memory and in float64 or the inputs' dtype: (B, H, Nq, Dv)."""

    def tiles(self, inputs: Inputs, shape: TileShape) -> Tiled | None:
        """The pairs that the method computes, as tiles of about `shape`, from which the lens computes its weights;
        None for a method without pairs."""
        return None

    def localise(self, inputs: Inputs) -> list[tuple[Method, Inputs]]:
        """The method and inputs to run, in batch order: more than one where each batch row needs a form of its own."""
        return [(self, inputs)]

    def refusals(self, inputs: Inputs) -> list[str]:
        """Reasons, beyond the registry's capabilities, why these parameters cannot serve these inputs."""
        return []

    def peak_elements(self, inputs: Inputs) -> int:
        """Predicted scratch of a forward pass beyond inputs and output, in elements of the inputs' dtype."""
        return 0

    def __str__(self) -> str:
        parts: list[str] = []
        for place, field in enumerate(fields(self)):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            # the first parameter is what tells one from another, so it is written even where it is the default
            if value == field.default and (place > 0 or isinstance(value, str)):
                continue
            text = value if isinstance(value, str) else repr(value).replace(" ", "")
            parts.append(text if place == len(parts) == 0 else f"{field.name}={text}")
        return f"{self.name}:{','.join(parts)}" if parts else self.name


M = TypeVar("M", bound=Method)

# bounds on string forms, which may come from a stranger: characters, nested brackets (a layout has two), whole numbers
# (a product of two must fit 64 bits)
LONGEST, DEEPEST, LARGEST = 100_000, 4, 2**31 - 1
# seeds are multiplied by a million
LARGEST_SEED = 2**40


def build_method(kind: type[M], text: str) -> M:
    """Build `kind` from the part of its string form after the colon.

    Raises `MethodError` where a parameter is unknown, given twice, missing or refused by the method itself.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for place, item in enumerate(_split_arguments(text)):
        name, equals, raw = item.partition("=")
        if not equals:
            if place >= len(names):
                raise MethodError(
                    f"'{kind.name}:{shorten(text)}': expected at most {len(names)} parameters {names}; drop "
                    f"'{shorten(item)}'"
                )
            name, raw = names[place], item
        if name not in names:
            raise MethodError(
                f"'{kind.name}:{shorten(text)}': unknown parameter '{shorten(name)}'; {kind.name} takes {names}"
            )
        if name in values:
            raise MethodError(f"'{kind.name}:{shorten(text)}': parameter '{name}' is given twice")
        values[name] = _literal(raw)
    try:
        return kind(**values)
    except TypeError as error:
        raise MethodError(f"'{kind.name}:{shorten(text)}': {error}; {kind.name} takes {names}") from None


def _split_arguments(text: str) -> list[str]:
    """Split at commas that stand outside brackets."""
    items, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth > DEEPEST:
            raise MethodError(f"'{shorten(text)}': brackets nest deeper than {DEEPEST}; no parameter needs that")
        if letter == "," and depth == 0:
            items.append(text[start:place])
            start = place + 1
    return [item.strip() for item in (*items, text[start:]) if item.strip()]


def _literal(raw: str) -> Any:
    try:
        return ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        return raw
    except (MemoryError, RecursionError):
        # chains such as 1+1+..., which Python's parser follows by recursion
        raise MethodError(f"expected a parameter to be a number, a word or a tuple, got '{shorten(raw)}'") from None


def shorten(value: object) -> str:
    """At most 80 characters of what a message quotes."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:
        # Python refuses to print integers of thousands of digits
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_count(method: str, name: str, value: object, least: int = 1, most: int = LARGEST) -> None:
    """Raise `MethodError` unless `value` is an int from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        got = repr(shorten(value)) if isinstance(value, str) else shorten(value)
        raise MethodError(f"{method}: expected {name} to be an int of at least {least}, got {got}")
    if value > most:
        raise MethodError(f"{method}: expected {name} to be at most {most}, got {shorten(value)}")
