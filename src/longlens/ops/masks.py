"""Masks as rules: who may attend to whom, defined by positions, never as an N x N tensor.

A rule answers for any handful of pairs (`allowed`) and prunes whole tiles before they are computed (`span`, `clear`).
Rules are composed with `&`. Sparse patterns (`longlens.Window(256)`, ...) are rules too, so that the same object serves
as a method and as a mask of another method.

Positions: see `longlens.shapes`. Query positions may lie outside 0..n-1 where Nq != Nk or keys were trimmed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longlens.errors import MaskError


class Rule(ABC):
    """Which pairs of query and key positions may attend."""

    @property
    def shift_invariant(self) -> bool:
        """True where `allowed` depends on key position minus query position alone: tiles can share one mask."""
        return False

    @abstractmethod
    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        """Bool, True = attend, broadcastable to (B, H, queries, keys).

        `q` (..., queries, 1) and `k` (..., 1, keys) hold positions (int64); `n` is the number of keys.
        """

    def span(self, lo: int, hi: int, n: int) -> tuple[int, int]:
        """Keys [a, b) outside which no query position in [lo, hi) attends. May be wider than need be."""
        return 0, n

    def clear(self, lo: int, hi: int, n: int) -> tuple[int, int]:
        """Keys [a, b) to all of which every query position in [lo, hi) attends. May be narrower; empty is (0, 0)."""
        return 0, 0

    def segment(self, start: int, stop: int) -> Rule:
        """The rule for packed tokens start..stop, whose positions start at 0. Rules on positions stay as they are."""
        return self

    def row(self, index: int) -> Rule:
        """The rule for batch row `index` alone."""
        return self

    def bind(self, batch: int, heads: int) -> Rule:
        """The rule for inputs of this batch size and number of query heads."""
        return self

    def __and__(self, other: Rule) -> Rule:
        if not isinstance(other, Rule):
            return NotImplemented
        return AllOf((*_members(self), *_members(other)))


def _members(rule: Rule) -> tuple[Rule, ...]:
    return rule.rules if isinstance(rule, AllOf) else (rule,)


@dataclass(frozen=True)
class AllOf(Rule):
    """Pairs that every one of `rules` allows; made by `&`."""

    rules: tuple[Rule, ...]

    @property
    def shift_invariant(self) -> bool:
        return all(rule.shift_invariant for rule in self.rules)

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        out = self.rules[0].allowed(q, k, n)
        for rule in self.rules[1:]:
            out = out & rule.allowed(q, k, n)
        return out

    def span(self, lo: int, hi: int, n: int) -> tuple[int, int]:
        spans = [rule.span(lo, hi, n) for rule in self.rules]
        return max(a for a, _ in spans), min(b for _, b in spans)

    def clear(self, lo: int, hi: int, n: int) -> tuple[int, int]:
        clears = [rule.clear(lo, hi, n) for rule in self.rules]
        return max(a for a, _ in clears), min(b for _, b in clears)

    def segment(self, start: int, stop: int) -> Rule:
        return AllOf(tuple(rule.segment(start, stop) for rule in self.rules))

    def row(self, index: int) -> Rule:
        return AllOf(tuple(rule.row(index) for rule in self.rules))

    def bind(self, batch: int, heads: int) -> Rule:
        return AllOf(tuple(rule.bind(batch, heads) for rule in self.rules))


@dataclass(frozen=True)
class Causal(Rule):
    """Key position <= query position; bottom-right aligned where Nq != Nk."""

    @property
    def shift_invariant(self) -> bool:
        return True

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        return k <= q

    def span(self, lo: int, hi: int, n: int) -> tuple[int, int]:
        return 0, max(0, min(n, hi))

    def clear(self, lo: int, hi: int, n: int) -> tuple[int, int]:
        return 0, max(0, min(n, lo + 1))


@dataclass(frozen=True)
class Prefix(Rule):
    """Causal, but the first `length` keys are seen by everyone (prefix language models)."""

    length: int

    def __post_init__(self) -> None:
        if self.length < 0:
            raise MaskError(f"expected a prefix length of at least 0, got {self.length}")

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        return (k <= q) | (k < self.length)

    def span(self, lo: int, hi: int, n: int) -> tuple[int, int]:
        return 0, max(0, min(n, max(hi, self.length)))

    def clear(self, lo: int, hi: int, n: int) -> tuple[int, int]:
        return 0, max(0, min(n, max(lo + 1, self.length)))


@dataclass(frozen=True, eq=False)
class SameDocument(Rule):
    """Query and key attend where their document numbers agree: `documents` (N,) or (B, N), integers; Nq = Nk.

    Sequences that lie end to end are cheaper packed with `cu_seqlens`, which computes no pair across them.
    """

    documents: Tensor

    def __post_init__(self) -> None:
        if self.documents.ndim not in (1, 2) or self.documents.is_floating_point():
            raise MaskError(
                f"expected documents to be integers of shape (N,) or (B, N), got {self.documents.dtype} "
                f"{tuple(self.documents.shape)}"
            )

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        ids = self.documents.to(k.device)
        if ids.shape[-1] != n:
            raise MaskError(f"expected one document number for each of {n} keys, got {ids.shape[-1]}")
        inside = (q >= 0) & (q < n)
        of_query, of_key = ids[..., q.clamp(0, n - 1)], ids[..., k]
        same = (of_query == of_key) & inside
        return same.unsqueeze(1) if ids.ndim == 2 else same

    def segment(self, start: int, stop: int) -> Rule:
        return SameDocument(self.documents[..., start:stop])

    def row(self, index: int) -> Rule:
        return self if self.documents.ndim == 1 else SameDocument(self.documents[index])


@dataclass(frozen=True)
class Predicate(Rule):
    """Any rule: `function(b, h, q, k) -> bool tensor`, as FlexAttention's `mask_mod`, evaluated tile by tile.

    `b` (B, 1, 1, 1), `h` (1, H, 1, 1), `q` and `k` are int64 tensors that broadcast. It is asked for every tile that
    the other rules leave, so memory stays linear while no tile is skipped.
    """

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    # set by `attention()`: batch rows first..first + batch, and query heads
    batch: int = 1
    heads: int = 1
    first: int = 0

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        b = torch.arange(self.first, self.first + self.batch, device=k.device).view(-1, 1, 1, 1)
        h = torch.arange(self.heads, device=k.device).view(1, -1, 1, 1)
        out = self.function(b, h, q, k)
        if not isinstance(out, Tensor) or out.dtype != torch.bool:
            got = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise MaskError(f"expected the predicate to return a bool tensor with True = attend, got {got}")
        return out

    def row(self, index: int) -> Rule:
        return Predicate(self.function, 1, self.heads, self.first + index)

    def bind(self, batch: int, heads: int) -> Rule:
        return Predicate(self.function, batch, heads)


@dataclass(frozen=True, eq=False)
class TensorMask(Rule):
    """A bool tensor (B|1, H|1, Nq|1, Nk|1), True = attend: the escape hatch, quadratic where Nq x Nk is given."""

    mask: Tensor

    def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        rows = (q - (n - self.mask.shape[2])).clamp(0, self.mask.shape[2] - 1)
        columns = k.clamp(max=self.mask.shape[3] - 1)
        return self.mask[..., rows, columns]

    def segment(self, start: int, stop: int) -> Rule:
        return TensorMask(_cut(_cut(self.mask, 2, start, stop), 3, start, stop))

    def row(self, index: int) -> Rule:
        return TensorMask(_cut(self.mask, 0, index, index + 1))


def _cut(tensor: Tensor, axis: int, start: int, stop: int) -> Tensor:
    """Slice an axis unless it is broadcast."""
    return tensor if tensor.shape[axis] == 1 else tensor.narrow(axis, start, stop - start)
