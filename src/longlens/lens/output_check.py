"""Whether the weights that the scan rebuilds are those of the model: they must give the model's own output."""

from __future__ import annotations

import torch
from torch import Tensor

from longlens.errors import LensError
from longlens.lens.block import Block
from longlens.ops.inputs import Inputs
from longlens.ops.tiles.index import take

# rows of a sequence on which the weights are checked
SAMPLES = 4
# relative error of an output that rounding explains, by dtype of the inputs
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class OutputCheck:
    """The weights of sampled rows must sum to 1 and, times the values, give the module's own output.

    What was found stays on the device until `judge` reads all of it at once.
    """

    def __init__(self, where: str, dtype: torch.dtype, sinks: bool) -> None:
        self.where, self.tolerance, self.sinks = where, TOLERANCE[dtype], sinks
        # rows whose keys are in several blocks: the sum of weights and the output so far, and the output to be
        self._sums: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._found: list[tuple[list[int], Tensor, Tensor]] = []

    def update(self, block: Block, inputs: Inputs, output: Tensor, first_head: int, queries: int) -> None:
        """Take in a block of `inputs` with `output` (heads, rows, Dv); looks at a few of the first `queries` rows."""
        if not isinstance(block.rows, slice):
            return
        first, step = block.rows.start, block.rows.step or 1
        samples = {round(place * (queries - 1) / max(1, SAMPLES - 1)) for place in range(SAMPLES)}
        rows = sorted(samples & set(range(first, block.rows.stop, step)))
        if not rows:
            return
        places = torch.tensor([(row - first) // step for row in rows], device=block.e.device)
        weights = block.e.index_select(1, places) * block.inverse.index_select(1, places)
        own = slice(block.heads.start - first_head, block.heads.stop - first_head)
        shared = torch.arange(own.start, own.stop, device=weights.device) // inputs.groups
        values = inputs.value.flatten(0, 1)[shared]
        of_keys = take(values, slice(0, len(values)), block.keys).to(weights.dtype)
        if block.masked:
            # a masked key's value may be NaN: it must not count
            of_keys = of_keys.masked_fill(~of_keys.isfinite(), 0.0)
        mass, mixed = weights.sum(-1), torch.bmm(weights, of_keys)
        there = output[own].index_select(1, torch.tensor(rows, device=output.device)).to(weights.dtype)
        if block.whole:
            self._compare(rows, mass, mixed, there)
            return
        for place, row in enumerate(rows):
            key = (row, block.heads.start)
            before = self._sums.get(key)
            so_far = (mass[:, place], mixed[:, place]) if before is None else (
                before[0] + mass[:, place], before[1] + mixed[:, place]
            )  # fmt: skip
            self._sums[key] = (*so_far, there[:, place])

    def finish(self) -> None:
        """All blocks of a part are seen."""
        for (row, _), (mass, mixed, there) in self._sums.items():
            self._compare([row], mass.unsqueeze(1), mixed.unsqueeze(1), there.unsqueeze(1))
        self._sums.clear()

    def _compare(self, rows: list[int], mass: Tensor, mixed: Tensor, there: Tensor) -> None:
        """`mass` (heads, rows), `mixed` and `there` (heads, rows, Dv)."""
        # a sink keeps some of the mass; a row that may attend to nothing has none
        over = (mass - 1.0).clamp(min=0) if self.sinks else (mass - 1.0).abs().masked_fill(mass == 0, 0.0)
        sizes = torch.maximum(_norm(there), _norm(mixed)).clamp(min=1e-30)
        self._found.append((rows, over.amax(0), _norm(mixed - there) / sizes))

    def judge(self) -> None:
        """Raise `LensError` unless all sampled rows fit."""
        if not self._found:
            return
        rows = [row for some, _, _ in self._found for row in some]
        masses = torch.cat([mass for _, mass, _ in self._found]).tolist()
        errors = torch.cat([error for _, _, error in self._found]).tolist()
        for row, worst, error in zip(rows, masses, errors, strict=True):
            if worst > 1e-3 or not error <= self.tolerance:
                raise LensError(
                    f"{self.where}: expected the weights that the lens rebuilt to give the model's own output, got a "
                    f"relative difference of {error:.2g} at query {row} (rounding explains {self.tolerance:.0e}) and a "
                    f"sum of weights off by {worst:.2g}; scale, mask, positions or heads differ from the model's"
                )


def _norm(tensor: Tensor) -> Tensor:
    """(heads, rows, Dv) -> (rows,)."""
    return torch.linalg.vector_norm(tensor, dim=(0, 2))
