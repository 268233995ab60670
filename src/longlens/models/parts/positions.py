"""How an encoder knows the order of its tokens. An encoder without positions has None of these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longlens.errors import InputError
from longlens.ops.biases import Bias, RelativePosition


@dataclass(frozen=True)
class RotaryPositions:
    """Queries and keys are rotated (`longlens.models.rotary`), in the half-split form."""

    base: float = 10_000.0


@dataclass(frozen=True)
class LearnedPositions:
    """A learned vector for each position is added to the embedding: a table of `rows`, read from row `offset` on.

    `normed`: a norm follows (ESM-1b; a post-norm encoder has one anyway).
    """

    rows: int
    offset: int = 0
    normed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.offset < self.rows:
            raise InputError(f"expected an offset below the {self.rows} rows of the table, got {self.offset}")

    @property
    def limit(self) -> int:
        """The most tokens of a sequence."""
        return self.rows - self.offset


@dataclass(frozen=True)
class RelativePositions:
    """A learned bias of the scores by the distance of key and query, one table for all layers (T5).

    `buckets` of distances up to `max_distance`, as `longlens.RelativePosition` of kind "t5" has them.
    """

    buckets: int = 32
    max_distance: int = 128


Positions = RotaryPositions | LearnedPositions | RelativePositions


class RelativeBias(nn.Module):
    """The table of `RelativePositions`: `weight` (buckets, heads), as checkpoints of T5 have it."""

    def __init__(self, positions: RelativePositions, heads: int) -> None:
        super().__init__()
        self.max_distance = positions.max_distance
        self.weight = nn.Parameter(torch.zeros(positions.buckets, heads))

    def forward(self) -> Bias:
        """The bias that attention takes. Its gradient reaches the table."""
        table: Tensor = self.weight.T
        return RelativePosition(table, "t5", self.max_distance)
