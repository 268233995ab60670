"""What a sparse method is: the exact softmax over some of the pairs, and unions of such methods.

A pattern is a mask rule (which pairs attend) that also knows where its pairs lie (`longlens.ops.sparse.strata`), so
that nothing else is computed.

Padding: where a pattern depends on absolute positions, positions count from the first kept key of each batch row to the
last, so that padding on either side changes nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from longlens.errors import MethodError
from longlens.ops.inputs import Inputs
from longlens.ops.masks import Rule
from longlens.ops.method import Method, Tiled
from longlens.ops.outputs import AttentionOutput
from longlens.ops.reference import softmax_attention
from longlens.ops.sparse.banded import head_start
from longlens.ops.sparse.strata import ShiftedIntervals, Stratum, StridedKeys, any_allowed, strata_tiles
from longlens.ops.tiles.engine import attend_tiles
from longlens.ops.tiles.grid import TileShape, merge_intervals, sparse_shape, tile_elements
from longlens.ops.tiles.problem import TiledProblem


class SparseMethod(Method):
    """Exact softmax over some of the pairs. `|` unites sparse methods."""

    def parts(self) -> tuple[SparseMethod, ...]:
        """What a union takes in of this method: itself, or the members of a union."""
        return (self,)

    def united(self, patterns: tuple[Pattern, ...]) -> Method:
        """The union with patterns, of a method whose pairs depend on the inputs."""
        raise NotImplementedError

    def __or__(self, other: Method) -> Method:
        return unite((self, other)) if isinstance(other, Method) else NotImplemented


class Pattern(Rule, SparseMethod):
    """A sparse method whose pairs are known beforehand. Subclasses are final frozen dataclasses."""

    @abstractmethod
    def strata(self) -> tuple[Stratum, ...]:
        """Where the pattern's pairs lie."""

    def causal_form(self) -> Pattern:
        """The pattern to use under a causal mask, where that differs."""
        return self

    @property
    def shift_invariant(self) -> bool:
        return all(stratum.shift_invariant for stratum in self.strata())

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        return any_allowed(self.strata(), q, k, n)

    def localise(self, inputs: Inputs) -> list[tuple[Method, Inputs]]:
        """The pattern in its causal form; under a key mask, each batch row with positions of its own."""
        form = self.causal_form() if inputs.causal else self
        if inputs.key_mask is None or form.shift_invariant:
            return [(form, inputs)]
        rows: list[tuple[Method, Inputs]] = []
        for part, keep in zip(inputs.rows(), inputs.key_mask, strict=True):
            kept = keep.nonzero()
            first, length = (int(kept[0]), int(kept[-1] - kept[0]) + 1) if len(kept) else (0, 0)
            whole = first == 0 and length == inputs.keys
            rows.append((form if whole else Shifted(form, first, length), part))
        return rows

    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Exact softmax over the pattern's pairs."""
        return attend_strata(self.strata(), inputs)

    def tiles(self, inputs: Inputs, shape: TileShape) -> Tiled:
        """The pattern's pairs."""
        return Tiled(inputs, strata_tiles(self.strata(), inputs, shape))

    def peak_elements(self, inputs: Inputs) -> int:
        """Scores of one tile, in the middle of the sequence or with global queries."""
        shape, n = sparse_shape(inputs), inputs.keys
        keys = 0
        for stratum in self.strata():
            if isinstance(stratum, StridedKeys):
                keys = max(keys, n // stratum.step)
                continue
            lo = n // 2
            ranges = merge_intervals(stratum.intervals(lo, min(n, lo + shape.rows), n), (0, n))
            keys += sum(b - a for a, b in ranges)
        return tile_elements(inputs, shape, keys)

    def reference(self, inputs: Inputs) -> Tensor:
        """Softmax over the pattern's pairs by definition."""
        parts = [softmax_attention(part, form)[0] for form, part in self.localise(inputs) if isinstance(form, Rule)]
        return torch.cat(parts)


@final
@dataclass(frozen=True)
class Union(Pattern):
    """Exact softmax over the pairs of any of `members`, each pair once: `Window(256) | Global((0,))`. Cost: the sum of
    theirs."""

    members: tuple[Pattern, ...]
    name: ClassVar[str] = "union"

    def parts(self) -> tuple[SparseMethod, ...]:
        """The members."""
        return self.members

    def strata(self) -> tuple[Stratum, ...]:
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
    parts: list[SparseMethod] = []
    for method in methods:
        if not isinstance(method, SparseMethod):
            raise MethodError(f"'|' unites sparse methods (window, global, ...), got '{method}'")
        parts.extend(method.parts())
    patterns = tuple(part for part in parts if isinstance(part, Pattern))
    others = [part for part in parts if not isinstance(part, Pattern)]
    if len(others) > 1:
        raise MethodError("'|' takes one lsh; give it more rounds instead")
    return others[0].united(patterns) if others else Union(patterns)


@dataclass(frozen=True)
class Shifted(Pattern):
    """A pattern on keys first..first + length, whose positions count from `first`."""

    pattern: Pattern
    first: int
    length: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """The pattern's own."""
        return self.pattern.name

    def strata(self) -> tuple[Stratum, ...]:
        """The pattern's strata, shifted where they depend on positions."""
        if self.length == 0:
            return ()
        return tuple(
            stratum if isinstance(stratum, StridedKeys) or stratum.shift_invariant
            else ShiftedIntervals(stratum, self.first, self.length)
            for stratum in self.pattern.strata()
        )  # fmt: skip

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        if self.length == 0:
            return torch.zeros(1, 1, dtype=torch.bool, device=k.device)
        return super().allowed(q, k, n)


def attend_strata(strata: Sequence[Stratum], inputs: Inputs) -> AttentionOutput:
    """Exact softmax over the union of strata."""
    shape = sparse_shape(inputs)
    start = head_start(strata, inputs)
    return attend_tiles(
        TiledProblem(
            inputs, lambda shapes, done: strata_tiles(strata, shapes, shape, done), shape.scores, head_start=start
        )
    )
