"""What the engine is asked to compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from longlens.ops.inputs import Inputs
from longlens.ops.tiles.grid import Interval, Tile


@dataclass(frozen=True)
class TiledProblem:
    """The inputs' settings, the tiles, and the most scores to compute at a time.

    `tiles` is called once in each pass, with the inputs as shapes and a range of rows that need none, and must give the
    same tiles each time.
    `bias_grad`: the bias is learned. `head_start`, where given, computes some rows of the output by a faster route,
    where no log-sum-exp is wanted (the backward pass of such rows wants none either): it fills `output` (BH, Nq, Dv)
    and returns the range of rows done.
    """

    inputs: Inputs
    tiles: Callable[[Inputs, Interval], Iterator[Tile]]
    scores: int
    bias_grad: bool = False
    head_start: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[int, int]] | None = None

    @property
    def scores_at_once(self) -> int:
        """The bound for a group of heads: none for a learned bias, whose gradient is summed over the batch."""
        return 2**62 if self.bias_grad else self.scores
