"""One tile of one group of heads: its scores, their softmax, and the gradient of both.

Scores of a pair: cap(scale q . k) + bias, -inf where the pair may not attend, with cap(s) = softcap tanh(s / softcap)
where a softcap is set (Gemma 2, Riviere et al. 2024, arXiv:2408.00118, section 2), and s where not.

Shapes here: heads are flattened, q (BH, Nq, D), k (BHkv, Nk, D), v (BHkv, Nk, Dv); G = H / Hkv query heads share a
key head. Scores are (heads, rows, keys), or (key heads, G rows, keys) when folded.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longlens.ops.biases import Bias
from longlens.ops.inputs import Inputs, wide_dtype
from longlens.ops.tiles.grid import Piece, Tile
from longlens.ops.tiles.index import Index, add, of_heads, positions, size, take
from longlens.ops.tiles.scratch import Scratch


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax and the gradients of scores for inputs of `dtype`: the one place that decides it.

    Wide: scores rounded to half precision would be off by up to 0.1 where they reach 30, and every weight with them.
    Weights and gradients are rounded to the inputs' dtype for their products alone.
    """
    return wide_dtype(dtype)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left (heads, m, x) times right (heads, x, n). Halves on CUDA give float32, which neither rounds nor overflows.

    On a CPU no product of halves gives float32: they give their own dtype, summed in float32.
    """
    if left.is_cuda and left.element_size() == 2:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right)


def head_groups(inputs: Inputs, tile: Tile, kv_heads: int, scores: int) -> Iterator[slice]:
    """Ranges of key heads (of B Hkv) in groups that make at most `scores` scores of a piece at a time."""
    if not tile.pieces:
        return
    per_head = inputs.groups * size(tile.rows) * max(size(piece.keys) for piece in tile.pieces)
    step = max(1, min(kv_heads, scores // max(1, per_head)))
    for start in range(0, kv_heads, step):
        yield slice(start, min(start + step, kv_heads))


def is_plain(tile: Tile, inputs: Inputs) -> bool:
    """A softmax over one piece gives the tile's result, and no log-sum-exp is needed."""
    return tile.once and len(tile.pieces) == 1 and not inputs.need_lse and inputs.sinks is None


def dropout_seed(seed: int, number: int, heads: slice) -> int:
    """The seed of tile `number` for a group of heads."""
    # hashed, because PyTorch's CPU generator reads only the low 32 bits
    digest = hashlib.blake2b(struct.pack("<3Q", seed, number, heads.start), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class TileKernel:
    """The arithmetic of one tile for the key heads `kv_heads`; `scale` in place of the inputs' where given."""

    def __init__(
        self,
        inputs: Inputs,
        q: Tensor,
        k: Tensor,
        kv_heads: slice,
        rows: Index,
        scratch: Scratch,
        *,
        seed: int = 0,
        scale: float | None = None,
    ) -> None:
        groups = inputs.groups
        self.inputs, self.k, self.kv_heads = inputs, k, kv_heads
        self.heads = slice(kv_heads.start * groups, kv_heads.stop * groups)
        self.rows = of_heads(rows, self.heads)
        self.dtype = score_dtype(q.dtype)
        self.q = self.fold(take(q, self.heads, self.rows))
        self._scale = inputs.scale if scale is None else scale
        self._count = size(rows)
        self._scratch = scratch
        self._generator: torch.Generator | None = None
        if inputs.dropout:
            self._generator = torch.Generator(q.device).manual_seed(seed)

    def keys(self, piece: Piece) -> Index:
        """The keys of a piece, as this group's heads number them."""
        return of_heads(piece.keys, self.kv_heads)

    def fold(self, tensor: Tensor) -> Tensor:
        """(heads, rows, x) -> (key heads, G rows, x): query heads that share keys as rows of one product."""
        return tensor.reshape(self.kv_heads.stop - self.kv_heads.start, -1, tensor.shape[2])

    def unfold(self, tensor: Tensor) -> Tensor:
        """(key heads, G rows, x) -> (heads, rows, x)."""
        return tensor.reshape(self.heads.stop - self.heads.start, self._count, tensor.shape[2])

    # ---- scores

    def scores(self, piece: Piece) -> Tensor:
        """Scaled, capped, biased, masked: (heads, rows, keys). The memory is the next piece's too."""
        return self.masked(self.capped(piece), piece)

    def capped(self, piece: Piece) -> Tensor:
        """cap(scale q . k): (heads, rows, keys), before bias and masks."""
        keys = take(self.k, self.kv_heads, self.keys(piece)).transpose(1, 2)
        if keys.is_cuda and keys.dtype != self.dtype:
            scores = self.unfold(wide_product(self.q, keys)).mul_(self._scale)
        else:
            # no product of halves gives float32 on a CPU
            scores = self._product(self.q.to(self.dtype) * self._scale, keys.to(self.dtype), "scores")
        if self.inputs.softcap is not None:
            scores.div_(self.inputs.softcap).tanh_().mul_(self.inputs.softcap)
        return scores

    def slope(self, capped: Tensor) -> Tensor | None:
        """The cap's derivative 1 - (s / softcap)^2, a new tensor, or None where there is no cap."""
        if self.inputs.softcap is None:
            return None
        ratio = capped / self.inputs.softcap
        return ratio.square_().neg_().add_(1.0)

    def masked(self, capped: Tensor, piece: Piece) -> Tensor:
        """Capped scores, in place, with bias, and -inf where a pair may not attend."""
        if self.inputs.bias is not None:
            capped += self._spread(self.inputs.bias.tile(*self._positions(piece), self.inputs.keys).to(capped.dtype))
        for edge in piece.edges:
            capped[..., edge.start : edge.stop].masked_fill_(~self._spread(edge.keep), -torch.inf)
        return capped

    # ---- softmax

    def softmax(self, scores: Tensor, piece: Piece) -> Tensor:
        """Weights, in place, over a piece that holds every key of its rows; 0 for a row with none."""
        # a bias of -inf masks too
        dead = self.dead(piece) if self.inputs.bias is None else scores.amax(-1, keepdim=True) == -torch.inf
        weights = torch.softmax(scores, -1, out=scores)
        return weights if dead is None else weights.masked_fill_(dead, 0.0)

    def online(self, pieces: Sequence[Piece], v: Tensor) -> tuple[Tensor, Tensor]:
        """Output (heads, rows, Dv) and log-sum-exp (heads, rows), wide, over all pieces."""
        wide = wide_dtype(self.dtype)
        shape = (self.heads.stop - self.heads.start, self._count, 1)
        top = torch.full(shape, -torch.inf, dtype=self.dtype, device=self.q.device)
        total = torch.zeros(shape, dtype=wide, device=self.q.device)
        out: Tensor | None = None
        for piece in pieces:
            scores = self.scores(piece)
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            # a row that has met no key yet: subtract 0, so that its weights stay exp(-inf) = 0
            ground = new_top.masked_fill(new_top == -torch.inf, 0.0)
            weights = scores.sub_(ground).exp_()
            decay = (top.to(wide) - ground.to(wide)).exp_()
            total = total * decay + weights.sum(-1, keepdim=True, dtype=wide)
            part = self.times(self.drop(weights), v, piece).to(wide)
            out = part if out is None else out.mul_(decay).add_(part)
            top = new_top
        if out is None:
            out = torch.zeros(*shape[:2], v.shape[2], dtype=wide, device=self.q.device)
        lse = top.to(wide) + total.log()
        return out.div_(total.masked_fill(total == 0, 1.0)), lse.squeeze(-1)

    def times(self, weights: Tensor, v: Tensor, piece: Piece) -> Tensor:
        """Weights (heads, rows, keys) times values: (heads, rows, Dv), of the dtype that `wide_product` gives.

        Weights that are not normalised yet may sum to thousands, and their products with values of float16 to more
        than it holds: on CUDA the result is float32. On a CPU the inputs are never float16 here.
        """
        values = take(v, self.kv_heads, self.keys(piece))
        return self.unfold(wide_product(self._rounded(self.fold(weights), v.dtype), values))

    def dead(self, piece: Piece) -> Tensor | None:
        """(heads|1, rows, 1) bool: rows with nothing to attend to; None where there are none."""
        width = size(piece.keys)
        if not any(edge.start == 0 and edge.stop == width for edge in piece.edges):
            return None
        dead = ~self._spread(piece.edges[0].keep).any(-1, keepdim=True)
        return None if dead.device.type == "cpu" and not bool(dead.any()) else dead

    # ---- dropout

    def drop(self, weights: Tensor) -> Tensor:
        """Dropout from this tile's own generator; a new tensor where it applies."""
        return weights if self._generator is None else weights * self._survivors(weights)

    def _survivors(self, weights: Tensor) -> Tensor:
        """0 where dropped, 1 / (1 - p) where kept, with p rounded to 16 bits."""
        # a draw of 64 bits serves four weights: PyTorch's CPU generator is serial and would dominate otherwise
        words = torch.empty(-(-weights.numel() // 4), dtype=torch.int64, device=weights.device)
        bits = words.random_(-(2**63), None, generator=self._generator).view(torch.int16)[: weights.numel()]
        # at least one weight in 65,536 is kept, or what is kept could not be scaled up
        lost = min(65_535, round(self.inputs.dropout * 65_536))
        return (bits >= lost - 32_768).view(weights.shape).to(weights.dtype).mul_(65_536 / (65_536 - lost))

    # ---- gradients

    def weights(self, scores: Tensor, piece: Piece, lse: Tensor | None) -> Tensor:
        """The weights again, in place of the scores: from the log-sum-exp (heads, rows, 1) of their rows, or, where it
        is None, by the softmax over a piece that holds every key."""
        if lse is None:
            return self.softmax(scores, piece)
        ground = lse.masked_fill(lse == -torch.inf, 0.0)
        return scores.to(ground.dtype).sub_(ground).exp_().to(self.dtype)

    def score_grads(
        self, weights: Tensor, piece: Piece, v: Tensor, d_o: Tensor, u: Tensor | None, d_v: Tensor
    ) -> Tensor:
        """The gradient of the biased scores, (heads, rows, keys), in memory of its own; adds to `d_v` on the way.

        `d_o` (key heads, G rows, Dv) is the output's gradient, `u` (heads, rows, 1) the rows' do . o - dlse, or None
        where the piece holds every key.
        """
        values = take(v, self.kv_heads, self.keys(piece))
        if d_o.is_cuda and d_o.dtype != self.dtype:
            d_weights = self.unfold(wide_product(d_o, values.transpose(1, 2)))
        else:
            d_weights = self._product(d_o, values.transpose(1, 2), "gradients").to(weights.dtype)
        if self._generator is None:
            dropped = weights
        else:
            survivors = self._survivors(weights)
            dropped = weights * survivors
            d_weights.mul_(survivors)
        dropped = self._rounded(self.fold(dropped), d_o.dtype)
        add(d_v, self.kv_heads, self.keys(piece), wide_product(dropped.transpose(1, 2), d_o))
        if u is None:
            # p (dp - sum_j p dp), fused
            return torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        return d_weights.to(u.dtype).sub_(u).mul_(weights).to(weights.dtype)

    def accumulate_bias(self, bias: Bias, grads: tuple[Tensor, ...], d_scores: Tensor, piece: Piece) -> None:
        """Add the gradient of a tile of all heads to that of the bias's parameters."""
        batch = self.inputs.query.shape[0]
        bias.accumulate(grads, d_scores.unflatten(0, (batch, -1)), *self._positions(piece), self.inputs.keys)

    # ---- helpers

    def _product(self, left: Tensor, right: Tensor, name: str) -> Tensor:
        """left (key heads, G rows, x) times right (key heads, x, keys), unfolded, in the scratch memory `name`."""
        shape = (*left.shape[:2], right.shape[2])
        return self.unfold(torch.bmm(left, right, out=self._scratch.empty(name, shape, left.dtype)))

    def _rounded(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tile in the dtype of its products; itself, or in scratch memory."""
        if tensor.dtype == dtype:
            return tensor
        return self._scratch.empty("rounded", tensor.shape, dtype).copy_(tensor)

    def _positions(self, piece: Piece) -> tuple[Tensor, Tensor]:
        device = self.k.device
        q = positions(self.rows, self.inputs.offset, device).unsqueeze(-1)
        return q, positions(self.keys(piece), 0, device).unsqueeze(-2)

    def _spread(self, tensor: Tensor) -> Tensor:
        """What broadcasts to (B, H, rows, keys) as what broadcasts to this group's (heads, rows, keys)."""
        if tensor.ndim <= 2:
            return tensor
        if tensor.ndim == 3:
            tensor = tensor.unsqueeze(0)
        if tensor.shape[:2] == (1, 1):
            return tensor[0]
        # index rather than expand: only this group's heads are copied
        flat = torch.arange(self.heads.start, self.heads.stop, device=tensor.device)
        row, head = flat // self.inputs.heads, flat % self.inputs.heads
        return tensor[row if tensor.shape[0] > 1 else row * 0, head if tensor.shape[1] > 1 else head * 0]
