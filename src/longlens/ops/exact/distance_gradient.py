"""The gradient of a bias of distances: sums of the scores' gradient along diagonals, in linear memory.

With weights p, ds_ij = p_ij (do_i . v_j - do_i . o_i), and the bias of distance d gets the sum of ds over j - i = d.
Near distances are a band of diagonals, which tiles compute. Beyond it the bias is one number on either side (a clipped
table beyond its ends, T5's buckets from distance 91 or 113 on), whose gradient is a sum over a whole corner of the
matrix. For the right one, j - i > high, attention over these keys alone is a plain causal attention of the fused
kernel, since a constant bias cancels; with its output o' and log-sum-exp l',

    sum_j ds_ij = m_i (do_i . o'_i - do_i . o_i),     m_i = exp(l'_i + b_right - lse_i)

and since each row of ds sums to 0, the left corner is what is missing to 0. So far distances cost half a forward pass.

Shapes here: as in `longlens.ops.exact.diagonals`, queries reversed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longlens.ops.exact.diagonals import Operands, Plan
from longlens.ops.fused_cpu import attend_cpu
from longlens.ops.inputs import wide_dtype
from longlens.ops.tiles.scratch import Scratch

# queries to a tile of the band, and most scores of a tile
ROWS = 128
SCORES = 2**21


def near_gradient(operands: Operands, d_o: Tensor, o: Tensor, lse: Tensor, near: Tensor, plan: Plan) -> Tensor:
    """The gradient of `near` (H, high - low + 1), given that of the output, the output and the rows' log-sum-exp."""
    wide = wide_dtype(d_o.dtype)
    u = torch.stack([torch.linalg.vecdot(d.to(wide), row.to(wide)) for d, row in zip(d_o, o, strict=True)])
    grad = _band(operands, d_o, lse, u, plan)
    left, right = plan.low > plan.lowest, plan.high < plan.highest and not plan.causal
    if left and right:
        grad[:, -1] += _right_corner(operands, d_o, lse, u, near[:, -1], plan)
    if left or right:
        grad[:, 0 if left else -1] -= grad.sum(1)
    return grad.to(near.dtype)


def _right_corner(operands: Operands, d_o: Tensor, lse: Tensor, u: Tensor, bias: Tensor, plan: Plan) -> Tensor:
    """(H,) float64: the sum of ds over keys more than `high` after their query."""
    q, k, v, _ = operands
    # with the keys reversed too, the corner's first row meets one key, the second two, ...
    first = plan.high + 1
    keys = min(k.shape[2], q.shape[2] - first)
    k, v = (tensor[:, :, tensor.shape[2] - keys :].flip(2) for tensor in (k, v))
    output, part = attend_cpu(q[:, :, first:], k, v, plan.scale, causal=True)
    mass = (part + bias.unsqueeze(1) - lse[:, :, first:]).exp_()
    sums = torch.zeros(q.shape[1], dtype=torch.float64)
    for d, row, weight, of_row in zip(d_o[:, :, first:], output, mass, u[:, :, first:], strict=True):
        sums += weight.mul(torch.linalg.vecdot(d.to(u.dtype), row.to(u.dtype)) - of_row).sum(1, dtype=torch.float64)
    return sums


def _band(operands: Operands, d_o: Tensor, lse: Tensor, u: Tensor, plan: Plan) -> Tensor:
    """(H, high - low + 1) float64: the sums of ds along the diagonals `low`..`high`."""
    q, k, _, bias = operands
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    first, last = plan.low - plan.lowest, plan.high - plan.lowest
    sums = torch.zeros(heads, last - first + 1, dtype=torch.float64)
    scratch = Scratch(q.device)
    width = max(ROWS, SCORES // (heads * ROWS))
    for start in range(0, queries, ROWS):
        stop = min(start + ROWS, queries)
        # row r and column j are on diagonal r + j
        low, high = max(0, first - stop + 1), min(keys, last - start + 1)
        for left in range(low, high, width):
            right = min(left + width, high)
            count = stop - start + right - left - 1
            tile_bias = bias[:, start + left : start + left + count]
            diagonals = torch.zeros(heads, count, dtype=torch.float64)
            for row in range(len(q)):
                at = (row, slice(start, stop), slice(left, right))
                diagonals += _tile(operands, d_o, lse, u, tile_bias, at, plan.scale, scratch)
            # diagonals of the tile beside the band are others' or nobody's
            a, b = max(first, start + left), min(last + 1, start + left + count)
            sums[:, a - first : b - first] += diagonals[:, a - start - left : b - start - left]
    return sums


def _tile(
    operands: Operands, d_o: Tensor, lse: Tensor, u: Tensor, bias: Tensor, at: tuple[int, slice, slice], scale: float,
    scratch: Scratch,
) -> Tensor:  # fmt: skip
    """(H, rows + keys - 1): the sums of ds of one tile along its diagonals r + j, for one batch row."""
    row, rows, keys = at
    q, d = operands.query[row, :, rows], d_o[row, :, rows]
    k, v = operands.key[row, :, keys], operands.value[row, :, keys]
    heads, m, n = q.shape[0], q.shape[1], k.shape[1]
    wide = u.dtype
    # query heads that share keys are rows of one product
    q, d = (tensor.to(wide).reshape(len(k), -1, tensor.shape[2]) for tensor in (q, d))
    shape = (len(k), q.shape[1], n)
    weights = torch.bmm(q * scale, k.to(wide).mT, out=scratch.empty("weights", shape, wide)).view(heads, m, n)
    weights += bias.as_strided((heads, m, n), (bias.stride(0), 1, 1), bias.storage_offset())
    weights.sub_(lse[row, :, rows].unsqueeze(2)).exp_()
    grads = torch.bmm(d, v.to(wide).mT, out=scratch.empty("gradients", shape, wide)).view(heads, m, n)
    grads.sub_(u[row, :, rows].unsqueeze(2))
    # row r moved by r columns: the diagonals r + j stand upright
    width = m + n - 1
    upright = scratch.empty("upright", (heads, m, width), wide).zero_()
    torch.mul(
        weights, grads, out=upright.as_strided((heads, m, n), (m * width, width + 1, 1), upright.storage_offset())
    )
    return upright.sum(1)
