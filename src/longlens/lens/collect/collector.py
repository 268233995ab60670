"""Collectors: the statistics of the attention matrix that can be asked for, and their states, which add up blocks.

    rows      LogSumExp Entropy EffectiveKeys Largest Distance DistanceSpread Mass TopKeys
    columns   Received ReceivedMean ReceivedMax TopQueries ColumnEntropy
    maps      Pooled DistanceHistogram WeightHistogram Rows Columns Cells

The formulas are in the docstrings of rows.py, columns.py and maps.py. Memory is linear in the length, plus the size
of a map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from longlens.errors import InputError
from longlens.lens.block import Block, Extent, Places
from longlens.lens.statistic import Statistic
from longlens.ops.observe import AttentionCall

R = TypeVar("R", bound=Statistic, covariant=True)


class State(ABC, Generic[R]):
    """A statistic under construction. States of one extent whose blocks had no pair in common can be merged.

    `together`: it can take in what was collected over sequences in padded batch rows (`absorb`).
    """

    together: ClassVar[bool] = False

    @abstractmethod
    def update(self, block: Block) -> None:
        """Add a block; no pair may be in two blocks."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the blocks of another state."""

    def absorb(self, other: Self, places: Places) -> None:
        """Take in a state over sequences that no block of this one had, laid in padded batch rows."""
        raise NotImplementedError(f"{type(self).__name__} depends on the numbering of the whole")

    @abstractmethod
    def result(self) -> R:
        """The statistic over all blocks so far."""


class Collector(ABC):
    """A statistic to collect; subclasses are frozen dataclasses whose fields are its parameters."""

    @property
    def largest(self) -> int:
        """How many of each row's largest weights it reads: the scan searches for no more than that."""
        return 0

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of its result: `seen.NAME`."""

    @abstractmethod
    def start(self, extent: Extent) -> State[Statistic]:
        """An empty state."""

    def of_call(self, call: AttentionCall) -> Collector:
        """The collector for one layer of a model: itself, unless it needs the layer's values or projection."""
        return self


def by_name(collect: Sequence[Collector]) -> dict[str, Collector]:
    """Collectors by their names; `InputError` for anything else than a collector, and for two of one name."""
    strange = [collector for collector in collect if not isinstance(collector, Collector)]
    if strange:
        raise InputError(f"expected collectors of longlens.lens, such as Entropy(), got {strange[0]!r}")
    names = [collector.name for collector in collect]
    if len(set(names)) != len(names):
        raise InputError(f"expected collectors of different names, got {', '.join(names)}")
    return dict(zip(names, collect, strict=True))


class Sums(State[R]):
    """A state of tensors (B H, ...) to which each block is added."""

    def __init__(self, extent: Extent, **shapes: tuple[int, ...]) -> None:
        self.extent = extent
        self.sums: dict[str, Tensor] = {name: extent.zeros(*shape) for name, shape in shapes.items()}

    def merge(self, other: Self) -> None:
        """Add the sums."""
        for name, tensor in other.sums.items():
            self.sums[name] += tensor

    def absorb(self, other: Self, places: Places) -> None:
        """Put sums (B H, N, ...) of tokens where they belong; only for states that are `together`."""
        for name, tensor in other.sums.items():
            places.put(self.sums[name], tensor)

    def of(self, name: str) -> Tensor:
        """(B, H, ...) of one sum."""
        return self.extent.by_head(self.sums[name])


def best_of(weight: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of (heads, m, candidates) with their indices, largest first."""
    weight, where = torch.topk(weight, min(count, weight.shape[-1]))
    return weight, index.gather(-1, where)
