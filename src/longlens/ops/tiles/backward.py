"""The backward pass, which makes each tile's weights again (Dao et al. 2022, arXiv:2205.14135, appendix B.2).

With weights p from the scores and the log-sum-exp, and u = do_i . o_i - dlse_i:

    dv_j += p_ij do_i;   ds_ij = p_ij (do_i . v_j - u_i);   db += -p_i,sink u_i
    dx_ij = ds_ij (1 - (cap(x_ij) / softcap)^2);   dq_i += scale dx_ij k_j;   dk_j += scale dx_ij q_i

where x = scale q k^T, s = cap(x) + bias, and b is a sink's logit. What is kept between the passes is linear in the
length. Dropout draws each tile's mask from a seed of its own, so that this pass draws the same one.

Shapes here: as in `longlens.ops.tiles.kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longlens.ops.inputs import wide_dtype
from longlens.ops.tiles.forward import sinks_by_head
from longlens.ops.tiles.grid import Tile
from longlens.ops.tiles.index import add, take
from longlens.ops.tiles.kernel import TileKernel, dropout_seed, head_groups, is_plain, wide_product
from longlens.ops.tiles.problem import TiledProblem
from longlens.ops.tiles.scratch import Scratch

# numbers of a gradient that are widened at a time, on an accelerator
AT_ONCE = 2**20
WHOLE = ("cpu",)


def backward(
    problem: TiledProblem,
    seed: int,
    grads: tuple[Tensor | None, Tensor | None],
    saved: Sequence[Any],
    biases: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, sinks and, where the bias is learned, its parameters.

    `grads`: of output and log-sum-exp; `saved`: query, key, value, output, log-sum-exp (or None), sinks (or None).
    """
    work = _Gradients(problem, grads, saved, biases)
    inputs, k = problem.inputs, work.k
    for number, tile in enumerate(problem.tiles(inputs, (0, 0))):
        plain = is_plain(tile, inputs)
        for heads in head_groups(inputs, tile, k.shape[0], problem.scores_at_once):
            tile_seed = dropout_seed(seed, number, heads)
            kernel = TileKernel(inputs, work.q, k, heads, tile.rows, work.scratch, seed=tile_seed)
            work.add_tile(kernel, tile, plain)
    return work.finish()


class _Gradients:
    """The gradients of one problem under construction, summed in float32 (float64 for float64)."""

    def __init__(
        self,
        problem: TiledProblem,
        grads: tuple[Tensor | None, Tensor | None],
        saved: Sequence[Any],
        biases: Sequence[Tensor],
    ) -> None:
        query, key, value, output, lse, self.sinks = saved
        d_output, d_lse = grads
        self.problem, self.query = problem, query
        self.scratch = Scratch(query.device)
        self.q, self.k, self.v, o = (tensor.flatten(0, 1) for tensor in (query, key, value, output))
        self.d_out = torch.zeros_like(o) if d_output is None else d_output.flatten(0, 1)
        wide = wide_dtype(query.dtype)
        tensors = (self.q, self.k, self.v)
        self.d_q, self.d_k, self.d_v = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in tensors)
        # none for a bias that is not learned: as a tensor it may be a view of far fewer numbers than its gradient
        self.biases = biases if problem.bias_grad else ()
        self.d_biases = tuple(torch.zeros_like(bias, dtype=wide_dtype(bias.dtype)) for bias in self.biases)
        # the rows' log-sum-exp and u, (BH, Nq): all that the softmax's Jacobian needs of a row
        self.lse = self.u = None
        if lse is not None:
            self.lse = lse.flatten(0, 1)
            u = row_products(self.d_out, o)
            self.u = u if d_lse is None else u - d_lse.flatten(0, 1)

    def add_tile(self, kernel: TileKernel, tile: Tile, plain: bool) -> None:
        """Add a tile's share to the gradients of query, key, value and bias."""
        inputs, dtype = self.problem.inputs, self.q.dtype
        d_o = kernel.fold(take(self.d_out, kernel.heads, kernel.rows))
        lse = u = None
        if not plain:
            lse, u = (_of_rows(tensor, kernel) for tensor in (self.lse, self.u))
        d_rows = None
        for piece in tile.pieces:
            capped = kernel.capped(piece)
            slope = kernel.slope(capped)
            weights = kernel.weights(kernel.masked(capped, piece), piece, lse)
            d_s = kernel.score_grads(weights, piece, self.v, d_o, u, self.d_v)
            if self.problem.bias_grad and inputs.bias is not None:
                kernel.accumulate_bias(inputs.bias, self.d_biases, d_s, piece)
            if slope is not None:
                d_s = d_s.mul_(slope)
            d_s, keys = kernel.fold(d_s).to(dtype), kernel.keys(piece)
            d_keys = wide_product(d_s.transpose(1, 2), kernel.q).to(self.d_k.dtype)
            add(self.d_k, kernel.kv_heads, keys, d_keys.mul_(inputs.scale))
            part = wide_product(d_s, take(self.k, kernel.kv_heads, keys)).to(self.d_q.dtype)
            d_rows = part if d_rows is None else d_rows.add_(part)
        if d_rows is not None:
            add(self.d_q, kernel.heads, kernel.rows, kernel.unfold(d_rows).mul_(inputs.scale))

    def finish(self) -> tuple[Tensor | None, ...]:
        """The gradients in the dtypes and shapes of what they are of."""
        batch = self.query.shape[0]
        grads = (d.to(self.q.dtype).unflatten(0, (batch, -1)) for d in (self.d_q, self.d_k, self.d_v))
        biases = (d.to(bias.dtype) for d, bias in zip(self.d_biases, self.biases, strict=True))
        return (*grads, self._d_sinks(), *biases)

    def _d_sinks(self) -> Tensor | None:
        sinks = sinks_by_head(self.sinks, self.query)
        if sinks is None:
            return None
        assert self.lse is not None
        assert self.u is not None
        # the sink's weight; a row without keys has none
        empty = self.lse == -torch.inf
        share = (sinks.unsqueeze(-1) - self.lse.masked_fill(empty, 0.0)).exp_().masked_fill_(empty, 0.0)
        return -(share * self.u).sum(1).unflatten(0, (self.query.shape[0], -1)).sum(0).to(self.sinks.dtype)


def at_once(tensor: Tensor) -> int:
    """Rows of (heads, rows, x) that are widened at a time on an accelerator."""
    return AT_ONCE // max(1, tensor.shape[0] * tensor.shape[2])


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """The products of rows, (heads, rows, x) and alike -> (heads, rows), wide.

    On an accelerator some rows at a time: wide copies of both, and their products, would be the most that the pass
    holds, and a pattern whose rows need no log-sum-exp up to some length would take far more memory beyond it.
    """
    wide = wide_dtype(left.dtype)
    rows = left.shape[1] if left.device.type in WHOLE else at_once(left)
    pairs = zip(*(tensor.split(max(1, rows), 1) for tensor in (left, right)), strict=True)
    parts = [torch.linalg.vecdot(some.to(wide), others.to(wide)) for some, others in pairs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _of_rows(tensor: Tensor | None, kernel: TileKernel) -> Tensor:
    """A number for each row of the tile, (heads, rows, 1)."""
    assert tensor is not None
    return take(tensor, kernel.heads, kernel.rows).unsqueeze(-1)
