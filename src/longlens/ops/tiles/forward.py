"""The forward pass over all tiles, in memory linear in the length.

For the queries of a tile (Rabe & Staats 2021, arXiv:2112.05682, section 3; Milakov & Gimelshein 2018,
arXiv:1805.02867, algorithm 3), for each piece of keys with scores s and running maximum m:

    m' = max(m, max_j s_j);   l <- l e^(m - m') + sum_j e^(s_j - m');   a <- a e^(m - m') + sum_j e^(s_j - m') v_j

and finally output = a / l, lse = m + log l. Where the queries' keys all lie in one piece, that is a plain softmax; and
where scores are small, m = 0 serves as well (`_Unshifted`). A sink of logit b is one more key, without a value: with
lse' = log(e^lse + e^b), the output is multiplied by e^(lse - lse'), and lse' is the log-sum-exp.

Shapes here: as in `longlens.ops.tiles.kernel`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from longlens.ops.inputs import Inputs, wide_dtype
from longlens.ops.tiles.grid import Tile
from longlens.ops.tiles.index import Index, of_heads, put, size, take
from longlens.ops.tiles.kernel import TileKernel, dropout_seed, head_groups, is_plain
from longlens.ops.tiles.problem import TiledProblem
from longlens.ops.tiles.scratch import Scratch

# the smallest sum of unshifted exponentials: weights lost below 1e-38 are then less than 1e-8 of it
LEAST_TOTAL = 1e-30
# values of a width that this divides are multiplied fastest in bfloat16
COLUMNS = 32


def forward(
    problem: TiledProblem,
    seed: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    needs_backward: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output (B, H, Nq, Dv), and the log-sum-exp (B, H, Nq) where it is asked for or the backward pass needs it."""
    inputs = problem.inputs
    q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
    buffer = OutputBuffer(q, v.shape[2], sinks_by_head(sinks, query))
    if inputs.need_lse or (sinks is not None and needs_backward):
        buffer.need_lse()
    done = (0, 0)
    if problem.head_start is not None and not inputs.need_lse and not inputs.dropout and sinks is None:
        done = problem.head_start(q, k, v, buffer.output)
    scratch = Scratch(q.device)
    unshifted = _Unshifted(inputs, q, k, v, scratch)
    for number, tile in enumerate(problem.tiles(inputs, done)):
        if not tile.pieces and tile.once:
            buffer.write_nothing(tile.rows)
        plain = is_plain(tile, inputs)
        for heads in head_groups(inputs, tile, k.shape[0], problem.scores_at_once):
            if plain and unshifted.attend(tile, heads, buffer):
                continue
            kernel = TileKernel(inputs, q, k, heads, tile.rows, scratch, seed=dropout_seed(seed, number, heads))
            if plain:
                (piece,) = tile.pieces
                weights = kernel.drop(kernel.softmax(kernel.scores(piece), piece))
                buffer.write(kernel.rows, kernel.heads, kernel.times(weights, v, piece))
                continue
            if needs_backward:
                buffer.need_lse()
            join = buffer.write if tile.once else buffer.merge
            join(kernel.rows, kernel.heads, *kernel.online(tile.pieces, v))
    output = buffer.finish().unflatten(0, query.shape[:2])
    return output, None if buffer.lse is None else buffer.lse.unflatten(0, query.shape[:2])


def sinks_by_head(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    """Sink logits (H,) as (B H,), wide."""
    return None if sinks is None else sinks.to(wide_dtype(query.dtype)).repeat(query.shape[0])


class OutputBuffer:
    """Output and log-sum-exp under construction; merges parts of a row in float32 (float64 for float64)."""

    def __init__(self, q: Tensor, width: int, sinks: Tensor | None) -> None:
        # every row stands in a tile, so every row is written
        self.output = torch.empty(*q.shape[:2], width, dtype=q.dtype, device=q.device)
        self.lse: Tensor | None = None
        self._sinks = sinks
        self._sum = self.output
        self._merging = False

    def need_lse(self) -> None:
        """Record the log-sum-exp of what is written from now on."""
        if self.lse is None:
            shape, wide = self.output.shape[:2], wide_dtype(self.output.dtype)
            self.lse = torch.full(shape, -torch.inf, dtype=wide, device=self.output.device)

    def write(self, rows: Index, heads: slice, out: Tensor, lse: Tensor | None = None) -> None:
        """Rows that no other tile holds. `lse` (heads, rows) of their keys, without the sinks."""
        if self._sinks is not None:
            assert lse is not None
            share, lse = with_sinks(lse, self._sinks[heads])
            out = out * share.unsqueeze(-1)
        put(self._sum, heads, rows, out)
        if self.lse is not None and lse is not None:
            put(self.lse, heads, rows, lse)

    def write_nothing(self, rows: Index) -> None:
        """Rows without keys."""
        heads = slice(0, len(self.output))
        rows = of_heads(rows, heads)
        shape = (len(self.output), size(rows))
        none = torch.full((1, 1), -torch.inf, dtype=wide_dtype(self.output.dtype), device=self.output.device)
        self.write(rows, heads, self.output.new_zeros(1, 1, 1).expand(*shape, self.output.shape[2]), none.expand(shape))

    def merge(self, rows: Index, heads: slice, out: Tensor, lse: Tensor) -> None:
        """Combine with what these rows hold: weights e^(lse - lse') of both (Milakov & Gimelshein 2018, equation 4)."""
        self.need_lse()
        assert self.lse is not None
        if not self._merging:
            # the tiles of a problem either merge or write: nothing is lost
            self._merging = True
            self._sum = torch.zeros_like(self.output, dtype=out.dtype)
        before = take(self.lse, heads, rows)
        after = torch.logaddexp(before, lse)
        ground = after.masked_fill(after == -torch.inf, 0.0)
        so_far = take(self._sum, heads, rows)
        mixed = so_far * (before - ground).exp_().unsqueeze(-1) + out * (lse - ground).exp_().unsqueeze(-1)
        put(self._sum, heads, rows, mixed)
        put(self.lse, heads, rows, after)

    def finish(self) -> Tensor:
        """The output (BH, Nq, Dv); the sinks join rows that were merged here, once all their keys are known."""
        if self._merging and self._sinks is not None:
            assert self.lse is not None
            share, self.lse = with_sinks(self.lse, self._sinks)
            self._sum.mul_(share.unsqueeze(-1))
        return self._sum.to(self.output.dtype)


def with_sinks(lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the mass that the keys keep beside a sink, and the log-sum-exp of both: (heads, rows) each.

    A row without keys stays one, of log-sum-exp -inf.
    """
    whole = torch.logaddexp(lse, sinks.unsqueeze(-1)).masked_fill_(lse == -torch.inf, -torch.inf)
    ground = whole.masked_fill(whole == -torch.inf, 0.0)
    return (lse - ground).exp_(), whole


class _Unshifted:
    """Softmax without the shift by each row's largest score, which saves two passes over the scores.

    A tile is accepted if the sum of every row is finite and above `LEAST_TOTAL`, and all products are finite; others
    are computed again with the shift. Only for bfloat16 on a CPU, where those passes take longer than the products; its
    exponents are float32's. Scores are made in bits, since a power of 2 is quicker than one of e.
    """

    def __init__(self, inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, scratch: Scratch) -> None:
        fits = v.dtype == torch.bfloat16 and v.device.type == "cpu"
        plain = not inputs.dropout and inputs.bias is None and inputs.softcap is None and not inputs.need_lse
        self._inputs, self._q, self._k, self._scratch = inputs, q, k, scratch
        self._width = v.shape[2]
        # key heads whose scores have been small so far
        self._small = [fits and plain and inputs.sinks is None] * v.shape[0]
        self._values = v
        if any(self._small) and v.shape[2] % COLUMNS:
            self._values = F.pad(v, (0, -v.shape[2] % COLUMNS))

    def attend(self, tile: Tile, kv_heads: slice, buffer: OutputBuffer) -> bool:
        """Write the output of a tile with one piece; False where the shift is needed."""
        if not all(self._small[kv_heads]):
            return False
        in_bits = self._inputs.scale * math.log2(math.e)
        kernel = TileKernel(self._inputs, self._q, self._k, kv_heads, tile.rows, self._scratch, scale=in_bits)
        (piece,) = tile.pieces
        e = kernel.scores(piece).exp2_()
        total = e.sum(-1, keepdim=True)
        sums = kernel.times(e, self._values, piece)[..., : self._width]
        dead = kernel.dead(piece)
        if dead is not None:
            total.masked_fill_(dead, 1.0)
        # neither too large for the format, nor so small that a weight that counts was lost
        least, most = total.aminmax()
        if not (sums.sum(dtype=torch.float32).isfinite() and most.isfinite() and least > LEAST_TOTAL):
            self._small[kv_heads] = [False] * (kv_heads.stop - kv_heads.start)
            return False
        buffer.write(kernel.rows, kernel.heads, sums.div_(total))
        return True
