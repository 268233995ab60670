"""Unions of patterns: `Window(256) | Global((0,))`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from longlens.errors import MethodError
from longlens.ops.inputs import Inputs
from longlens.ops.method import Method
from longlens.ops.sparse.lsh import LSH, HashedUnion
from longlens.ops.sparse.pattern import Intervals, Lane, Pattern


@final
@dataclass(frozen=True)
class Union(Pattern):
    """Exact softmax over the pairs of any of `members`, each pair once. Cost: the sum of theirs."""

    members: tuple[Pattern, ...]
    name: ClassVar[str] = "union"

    def strata(self) -> tuple[Intervals | Lane, ...]:
        """The members' strata."""
        return tuple(stratum for member in self.members for stratum in member.strata())

    def causal_form(self) -> Pattern:
        """The members' causal forms."""
        return Union(tuple(member.causal_form() for member in self.members))

    def refusals(self, inputs: Inputs) -> list[str]:
        """Whatever a member refuses."""
        return [reason for member in self.members for reason in member.refusals(inputs)]

    def __str__(self) -> str:
        return "|".join(map(str, self.members))


def unite(methods: Sequence[Method]) -> Method:
    """The union of sparse methods; `MethodError` where one is not sparse."""
    patterns: list[Pattern] = []
    hashes: list[LSH] = []
    for method in methods:
        if isinstance(method, Union):
            patterns.extend(method.members)
        elif isinstance(method, HashedUnion):
            patterns.extend(method.members)
            hashes.append(method.hashed)
        elif isinstance(method, Pattern):
            patterns.append(method)
        elif isinstance(method, LSH):
            hashes.append(method)
        else:
            raise MethodError(f"'|' unites sparse methods (window, global, ...), got '{method}'")
    if len(hashes) > 1:
        raise MethodError("'|' takes one lsh; give it more rounds instead")
    if hashes:
        return HashedUnion(tuple(patterns), hashes[0])
    return Union(tuple(patterns))
