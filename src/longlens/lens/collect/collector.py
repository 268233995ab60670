"""What can be asked of the attention matrix. A collector names it; its state is fed block by block as the scan walks.

    rows      LogSumExp Entropy EffectiveKeys Largest Distance DistanceSpread Mass TopKeys
    columns   Received ReceivedMean ReceivedMax TopQueries ColumnEntropy
    maps      Pooled DistanceHistogram WeightHistogram Rows Columns Cells

The formulas stand at each in rows.py, columns.py and maps.py. Memory is linear in the length, beside a map's own size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from longlens.errors import InputError
from longlens.lens.block import Block, Extent
from longlens.lens.statistic import Statistic
from longlens.ops.observe import AttentionCall

R = TypeVar("R", bound=Statistic, covariant=True)


class State(ABC, Generic[R]):
    """A statistic under construction. States of one extent that saw disjoint pairs can be merged."""

    @abstractmethod
    def update(self, block: Block) -> None:
        """Take in a block; no pair comes twice."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what another state saw."""

    @abstractmethod
    def result(self) -> R:
        """The statistic over all that was seen."""


class Collector(ABC):
    """A statistic to collect; subclasses are frozen dataclasses whose fields are its parameters."""

    @property
    def largest(self) -> int:
        """How many of each row's largest weights it reads, so that the scan prepares no more."""
        return 0

    @property
    @abstractmethod
    def name(self) -> str:
        """Under which its result stands: `seen.NAME`."""

    @abstractmethod
    def start(self, extent: Extent) -> State[Statistic]:
        """An empty state."""

    def of_call(self, call: AttentionCall) -> Collector:
        """The collector for one layer of a model; itself unless it takes something of that layer."""
        return self


def by_name(collect: Sequence[Collector]) -> dict[str, Collector]:
    """Collectors by their names; `InputError` for what is no collector, and for two of one name."""
    strange = [collector for collector in collect if not isinstance(collector, Collector)]
    if strange:
        raise InputError(f"expected collectors of longlens.lens, such as Entropy(), got {strange[0]!r}")
    names = [collector.name for collector in collect]
    if len(set(names)) != len(names):
        raise InputError(f"expected collectors of different names, got {', '.join(names)}")
    return dict(zip(names, collect, strict=True))


class Sums(State[R]):
    """A state that is tensors to which blocks add."""

    def __init__(self, extent: Extent, **shapes: tuple[int, ...]) -> None:
        self.extent = extent
        self.sums: dict[str, Tensor] = {name: extent.zeros(*shape) for name, shape in shapes.items()}

    def merge(self, other: Self) -> None:
        """Add the sums."""
        for name, tensor in other.sums.items():
            self.sums[name] += tensor

    def of(self, name: str) -> Tensor:
        """(B, H, ...) of one sum."""
        return self.extent.by_head(self.sums[name])


def best_of(weight: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of (heads, m, candidates) with their indices, largest first."""
    weight, where = torch.topk(weight, min(count, weight.shape[-1]))
    return weight, index.gather(-1, where)
