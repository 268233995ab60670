"""Attention weights whose log-sum-exp is known: those of any tile at will, without its row's other keys.

    f_h p_ij = f_h exp(scale q_i . k_j - lse_i) = 2^(a_i . b_j),
    a_i = [scale q_i, log f_h - lse_i] / log 2,    b_j = [k_j, 1]

for heads h with positive factors f_h (1 where none are wanted): one matrix product of vectors that are wider by one,
and one power of 2, which is several times quicker than one of e. A row without keys (lse = -inf) has weights of 0.

This is for plain scores, and for those with a bias of distances, whose exponents are added to the product: no mask or
cap. `longlens.ops.tiles.kernel` makes those that have one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longlens.ops.biases import Bias
from longlens.ops.inputs import wide_dtype
from longlens.ops.tiles.scratch import Scratch

LN2 = math.log(2.0)


@dataclass(frozen=True)
class KnownWeights:
    """Weights of `heads` heads, each with keys of its own.

    query (heads, Nq, D) and key (heads, Nk, D): floating, as attention got them; half precision is widened to float32.
    lse (heads, Nq): natural logarithm, in float32 (float64 for float64 inputs). Its error is the weights' relative one.
    scale: the factor of the scores.
    factor (heads,): positive, multiplies a head's weights; None for 1.
    bias: of distances, in the scores that `lse` is of; `heads` are the numbers of the heads in it.
    """

    query: Tensor
    key: Tensor
    lse: Tensor
    scale: float
    factor: Tensor | None = None
    bias: Bias | None = None
    heads: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        """a_i of the queries `rows`, (heads, m, D + 1)."""
        wide = wide_dtype(self.query.dtype)
        shift = self.lse[:, rows].to(wide) / -LN2
        if self.factor is not None:
            shift = shift + self.factor.to(wide).log2().unsqueeze(1)
        shift = shift.masked_fill(shift == torch.inf, -torch.inf)
        return torch.cat([self.query[:, rows].to(wide) * (self.scale / LN2), shift.unsqueeze(2)], 2)

    def bits(self, rows: slice, columns: slice) -> Tensor | None:
        """The bias of a tile in bits, (heads, m, n), or None where there is none: what `tile_weights` adds."""
        if self.bias is None:
            return None
        assert self.heads is not None
        first, last = columns.start - rows.stop + 1, columns.stop - rows.start
        values = self._by_distance(torch.arange(first, last, device=self.query.device))
        m, n = rows.stop - rows.start, columns.stop - columns.start
        # the last row reads from the first number on, and the row before it from the second
        return values.as_strided((len(values), m, n), (values.shape[1], 1, 1)).flip(1)

    def pair_bits(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """The bias in bits of queries `rows` (m,) with keys `columns` (m,), each with its own: (heads, m)."""
        return None if self.bias is None else self._by_distance(columns - rows)

    def _by_distance(self, distance: Tensor) -> Tensor:
        assert self.bias is not None
        assert self.heads is not None
        return (self.bias.at(distance).detach()[self.heads].to(wide_dtype(self.query.dtype)) / LN2).contiguous()

    def columns(self, columns: slice) -> Tensor:
        """b_j of the keys `columns`, (heads, n, D + 1)."""
        keys = self.key[:, columns].to(wide_dtype(self.key.dtype))
        return torch.cat([keys, keys.new_ones(*keys.shape[:2], 1)], 2)


def tile_weights(rows: Tensor, columns: Tensor, scratch: Scratch, bits: Tensor | None = None) -> Tensor:
    """f p of all pairs of `rows` (heads, m, D + 1) and `columns` (heads, n, D + 1): (heads, m, n); `bits` are added to
    their exponents.

    The memory is `scratch`'s, and the next tile's too.
    """
    shape = (len(rows), rows.shape[1], columns.shape[1])
    out = scratch.empty("weights", shape, rows.dtype)
    torch.bmm(rows, columns.transpose(1, 2), out=out)
    return out.exp2_() if bits is None else out.add_(bits).exp2_()


def pair_weights(rows: Tensor, columns: Tensor, bits: Tensor | None = None) -> Tensor:
    """f p of query i with key i, for `rows` (heads, m, D + 1) and `columns` alike: (heads, m)."""
    exponents = torch.linalg.vecdot(rows, columns)
    return exponents.exp2_() if bits is None else exponents.add_(bits).exp2_()
