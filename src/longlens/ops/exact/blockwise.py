"""Softmax attention over tiles, with the backward pass recomputed: the engine under exact and sparse methods.

Forward, for the queries of a tile (Rabe & Staats 2021, arXiv:2112.05682, section 3; Milakov & Gimelshein 2018,
arXiv:1805.02867, algorithm 3). For each piece of keys with scores s and running maximum m:

    m' = max(m, max_j s_j);   l <- l e^(m - m') + sum_j e^(s_j - m');   a <- a e^(m - m') + sum_j e^(s_j - m') v_j

and finally output = a / l, lse = m + log l. Where the queries' keys all lie in one piece, that is a plain softmax; and
where scores are small, m = 0 serves as well, and one product gives a and l together (`_Unshifted`).

Backward (Dao et al. 2022, arXiv:2205.14135, appendix B.2) rebuilds the weights p from the scores and the log-sum-exp:

    dv_j += p_ij do_i;   ds_ij = p_ij (do_i . v_j - do_i . o_i + dlse_i)
    dq_i += scale ds_ij k_j;   dk_j += scale ds_ij q_i

so what is kept between the passes is linear in the length. Dropout draws each tile's mask from a seed of its own, so
that the backward pass draws the same one. Second derivatives are refused (`UnsupportedError`).

Shapes here: heads are flattened, q (BH, Nq, D), k (BHkv, Nk, D), v (BHkv, Nk, Dv); G = H / Hkv query heads share a
key head.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longlens.errors import UnsupportedError
from longlens.ops.inputs import Inputs
from longlens.ops.method import Attended
from longlens.ops.tiles import Index, Interval, Piece, Tile, positions, size

# the smallest sum of unshifted exponentials: weights lost below 1e-38 are then less than 1e-8 of it
LEAST_TOTAL = 1e-30


@dataclass(frozen=True)
class Walk:
    """What the engine computes: the inputs' settings, the tiles, and the most scores to hold at a time.

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


def attend_tiles(walk: Walk) -> Attended:
    """Run the walk. Differentiable once in query, key, value and the bias's parameters."""
    inputs = walk.inputs
    seed = int(torch.randint(2**62, ()).item()) if inputs.dropout else 0
    biases = inputs.bias.parameters() if inputs.bias else ()
    # the tensors travel as arguments, where autograd sees them and checkpointing can free them
    bare = replace(
        inputs.shapes(),
        bias=inputs.bias.with_parameters(tuple(b.detach() for b in biases)) if inputs.bias else None,
    )
    learned = torch.is_grad_enabled() and any(bias.requires_grad for bias in biases)
    walk = replace(walk, inputs=bare, bias_grad=learned)
    output, lse = _TileAttention.apply(walk, seed, inputs.query, inputs.key, inputs.value, *biases)
    return Attended(output, lse if inputs.need_lse else None)


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, walk: Walk, seed: int, query: Tensor, key: Tensor, value: Tensor, *biases: Tensor) -> Any:
        needs_backward = any(ctx.needs_input_grad)
        output, lse = _forward(walk, seed, query, key, value, needs_backward)
        ctx.walk, ctx.seed, ctx.count = replace(walk, head_start=None), seed, len(biases)
        if needs_backward:
            ctx.save_for_backward(query, key, value, output, lse, *biases)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_lse: Tensor | None) -> Any:
        grads = _TileAttentionBackward.apply(ctx.walk, ctx.seed, d_output, d_lse, *ctx.saved_tensors)
        if not ctx.walk.bias_grad:
            grads = (*grads[:3], *(None for _ in range(ctx.count)))
        return (None, None, *grads)


class _TileAttentionBackward(torch.autograd.Function):
    """A function of its own so that differentiating twice meets a clear refusal."""

    @staticmethod
    def forward(ctx: Any, walk: Walk, seed: int, d_output: Tensor | None, d_lse: Tensor | None, *saved: Tensor) -> Any:
        query, key, value, output, lse, *biases = saved
        return _backward(walk, seed, d_output, d_lse, query, key, value, output, lse, tuple(biases))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(
            "second derivatives are not supported by the blockwise path; use method='exact:path=math' (quadratic "
            "memory) or an approximator such as 'linear', whose gradients are differentiable"
        )


def _forward(
    walk: Walk, seed: int, query: Tensor, key: Tensor, value: Tensor, needs_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """Output (B, H, Nq, Dv), and the log-sum-exp (B, H, Nq) where it is asked for or the backward pass needs it."""
    inputs = walk.inputs
    q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
    result = _Result(q, v.shape[2])
    if inputs.need_lse:
        result.need_lse()
    done = (0, 0)
    if walk.head_start is not None and not inputs.need_lse and not inputs.dropout:
        done = walk.head_start(q, k, v, result.output)
    unshifted = _Unshifted(inputs, v)
    for number, tile in enumerate(walk.tiles(inputs, done)):
        if not tile.pieces and tile.once:
            result.write(tile.rows, slice(None), result.output.new_zeros(()))
        plain = _is_plain(tile, inputs)
        for heads in head_groups(walk, tile, k.shape[0]):
            kernel = TileKernel(inputs, q, k, heads, tile.rows, _dropout_seed(seed, number, heads))
            if plain:
                if not unshifted.attend(kernel, tile.pieces[0], result):
                    weights = kernel.drop(kernel.softmax(tile.pieces[0]))
                    result.write(tile.rows, kernel.heads, kernel.times(weights, v, tile.pieces[0].keys))
                continue
            out, lse = kernel.online(tile.pieces, v)
            if needs_backward:
                result.need_lse()
            result.write(tile.rows, kernel.heads, out, lse) if tile.once else result.merge(
                tile.rows, kernel.heads, out, lse
            )
    output = result.finish().unflatten(0, query.shape[:2])
    return output, None if result.lse is None else result.lse.unflatten(0, query.shape[:2])


def _backward(
    walk: Walk,
    seed: int,
    d_output: Tensor | None,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor | None,
    biases: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    inputs = walk.inputs
    q, k, v, o = (tensor.flatten(0, 1) for tensor in (query, key, value, output))
    d_out = torch.zeros_like(o) if d_output is None else d_output.flatten(0, 1)
    wide = _wide(q.dtype)
    d_q, d_k, d_v = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
    d_biases = tuple(torch.zeros_like(bias, dtype=_wide(bias.dtype)) for bias in biases)
    # do_i . o_i - dlse_i, all that the softmax's Jacobian needs of a row
    delta = None
    flat_lse = None
    if lse is not None:
        flat_lse = lse.flatten(0, 1)
        delta = torch.linalg.vecdot(d_out.to(wide), o.to(wide))
        delta = delta if d_lse is None else delta - d_lse.flatten(0, 1)
    for number, tile in enumerate(walk.tiles(inputs, (0, 0))):
        plain = _is_plain(tile, inputs)
        for heads in head_groups(walk, tile, k.shape[0]):
            kernel = TileKernel(inputs, q, k, heads, tile.rows, _dropout_seed(seed, number, heads))
            d_o = kernel.fold(_take(d_out, kernel.heads, tile.rows))
            row_terms = None
            if not plain:
                assert flat_lse is not None
                assert delta is not None
                row_terms = tuple(_take(t, kernel.heads, tile.rows).unsqueeze(-1) for t in (flat_lse, delta))
            d_rows = None
            for piece in tile.pieces:
                p, d_s = kernel.weights_and_score_grads(piece, v, d_o, row_terms, d_v)
                if walk.bias_grad and inputs.bias is not None:
                    kernel.accumulate_bias(inputs.bias, d_biases, d_s, piece)
                d_s = kernel.fold(d_s)
                _add(d_k, kernel.kv_heads, piece.keys, torch.bmm(d_s.transpose(1, 2), kernel.q))
                part = torch.bmm(d_s, _take(k, kernel.kv_heads, piece.keys)).to(wide)
                d_rows = part if d_rows is None else d_rows.add_(part)
                del p, d_s
            if d_rows is not None:
                _add(d_q, kernel.heads, tile.rows, kernel.unfold(d_rows).mul_(inputs.scale))
    shapes = (query, key, value)
    grads = [g.to(t.dtype).unflatten(0, t.shape[:2]) for g, t in zip((d_q, d_k, d_v), shapes, strict=True)]
    return (*grads, *(d.to(bias.dtype) for d, bias in zip(d_biases, biases, strict=True)))


class _Unshifted:
    """Softmax without the shift by each row's largest score, which saves two walks over the scores, wherever the result
    shows that it was not needed.

    Only for bfloat16 on a CPU, where those walks take longer than the products; its exponents are float32's.
    """

    def __init__(self, inputs: Inputs, v: Tensor) -> None:
        fits = v.dtype == torch.bfloat16 and v.device.type == "cpu"
        plain = not inputs.dropout and inputs.bias is None and not inputs.need_lse
        # key heads whose scores have been small so far
        self.heads = [fits and plain] * v.shape[0]
        # one product gives both the weighted sum and the sum of the weights
        self.values = torch.cat([v, v.new_ones(*v.shape[:2], 1)], 2) if any(self.heads) else v

    def attend(self, kernel: TileKernel, piece: Piece, result: _Result) -> bool:
        """Write the output over a piece that holds every key of its rows; False where the shift is needed."""
        if not all(self.heads[kernel.kv_heads]):
            return False
        sums = kernel.times(kernel.scores(piece).exp_(), self.values, piece.keys)
        total = sums[..., -1:]
        dead = kernel.dead(piece)
        if dead is not None:
            total.masked_fill_(dead, 1.0)
        # neither too large for the format, nor so small that a weight that counts was lost
        if not (sums.sum(dtype=torch.float32).isfinite() and total.amin() > LEAST_TOTAL):
            self.heads[kernel.kv_heads] = [False] * (kernel.kv_heads.stop - kernel.kv_heads.start)
            return False
        if isinstance(kernel.rows, slice):
            torch.div(sums[..., :-1], total, out=result.output[kernel.heads, kernel.rows])
        else:
            result.write(kernel.rows, kernel.heads, sums[..., :-1] / total)
        return True


class TileKernel:
    """One tile of one group of heads. Scores are (heads, rows, keys), or (key heads, G rows, keys) when folded."""

    def __init__(self, inputs: Inputs, q: Tensor, k: Tensor, kv_heads: slice, rows: Index, seed: int) -> None:
        groups = inputs.groups
        self.inputs, self.k, self.rows = inputs, k, rows
        self.kv_heads = kv_heads
        self.heads = slice(kv_heads.start * groups, kv_heads.stop * groups)
        self.count = size(rows)
        self.q = self.fold(_take(q, self.heads, rows) * inputs.scale)
        self._generator: torch.Generator | None = None
        if inputs.dropout:
            self._generator = torch.Generator(q.device).manual_seed(seed)

    def fold(self, tensor: Tensor) -> Tensor:
        """(heads, rows, x) -> (key heads, G rows, x): query heads that share keys as rows of one product."""
        return tensor.reshape(self.kv_heads.stop - self.kv_heads.start, -1, tensor.shape[2])

    def unfold(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.heads.stop - self.heads.start, self.count, tensor.shape[2])

    def scores(self, piece: Piece) -> Tensor:
        """Scaled, biased, masked: (heads, rows, keys)."""
        keys = _take(self.k, self.kv_heads, piece.keys)
        scores = self.unfold(torch.bmm(self.q, keys.transpose(1, 2)))
        if self.inputs.softcap is not None:
            scores.div_(self.inputs.softcap).tanh_().mul_(self.inputs.softcap)
        if self.inputs.bias is not None:
            scores += self._spread(self.inputs.bias.tile(*self._positions(piece), self.inputs.keys).to(scores.dtype))
        for edge in piece.edges:
            scores[..., edge.start : edge.stop].masked_fill_(~self._spread(edge.keep), -torch.inf)
        return scores

    def softmax(self, piece: Piece) -> Tensor:
        """Weights over a piece that holds every key of its rows; 0 for a row with none."""
        scores = self.scores(piece)
        # a bias of -inf masks too
        dead = self.dead(piece) if self.inputs.bias is None else scores.amax(-1, keepdim=True) == -torch.inf
        weights = torch.softmax(scores, -1, out=scores)
        return weights if dead is None else weights.masked_fill_(dead, 0.0)

    def online(self, pieces: Sequence[Piece], v: Tensor) -> tuple[Tensor, Tensor]:
        """Output (heads, rows, Dv) and log-sum-exp (heads, rows), wide, over all pieces."""
        wide = _wide(self.q.dtype)
        shape = (self.heads.stop - self.heads.start, self.count, 1)
        top = torch.full(shape, -torch.inf, dtype=self.q.dtype, device=self.q.device)
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
            part = self.times(self.drop(weights), v, piece.keys).to(wide)
            out = part if out is None else out.mul_(decay).add_(part)
            top = new_top
        if out is None:
            out = torch.zeros(*shape[:2], v.shape[2], dtype=wide, device=self.q.device)
        lse = top.to(wide) + total.log()
        return out.div_(total.masked_fill(total == 0, 1.0)), lse.squeeze(-1)

    def times(self, weights: Tensor, v: Tensor, keys: Index) -> Tensor:
        """Weights (heads, rows, keys) times values: (heads, rows, Dv)."""
        return self.unfold(torch.bmm(self.fold(weights), _take(v, self.kv_heads, keys)))

    def drop(self, weights: Tensor) -> Tensor:
        """Dropout from this tile's own generator; a new tensor where it applies."""
        return weights if self._generator is None else weights * self._survivors(weights)

    def _survivors(self, weights: Tensor) -> Tensor:
        """0 where dropped, 1 / (1 - p) where kept, with p rounded to 16 bits."""
        # a draw of 64 bits serves four weights: PyTorch's CPU generator is serial and would dominate otherwise
        words = torch.empty(-(-weights.numel() // 4), dtype=torch.int64, device=weights.device)
        bits = words.random_(-(2**63), None, generator=self._generator).view(torch.int16)[: weights.numel()]
        lost = round(self.inputs.dropout * 65_536)
        return (bits >= lost - 32_768).view(weights.shape).to(weights.dtype).mul_(65_536 / (65_536 - lost))

    def weights_and_score_grads(
        self, piece: Piece, v: Tensor, d_o: Tensor, row_terms: tuple[Tensor, ...] | None, d_v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights and the gradient of the scores, both (heads, rows, keys); adds to `d_v` on the way."""
        if row_terms is None:
            weights = self.softmax(piece)
        else:
            lse, _ = row_terms
            ground = lse.masked_fill(lse == -torch.inf, 0.0)
            weights = self.scores(piece).to(ground.dtype).sub_(ground).exp_().to(self.q.dtype)
        d_weights = self.unfold(torch.bmm(d_o, _take(v, self.kv_heads, piece.keys).transpose(1, 2)))
        if self._generator is None:
            dropped = weights
        else:
            survivors = self._survivors(weights)
            dropped = weights * survivors
            d_weights.mul_(survivors)
        _add(d_v, self.kv_heads, piece.keys, torch.bmm(self.fold(dropped).transpose(1, 2), d_o))
        if row_terms is None:
            # p (dp - sum_j p dp), fused
            return weights, torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        return weights, (d_weights.to(row_terms[1].dtype).sub_(row_terms[1]).mul_(weights)).to(weights.dtype)

    def accumulate_bias(self, bias: Any, grads: tuple[Tensor, ...], d_scores: Tensor, piece: Piece) -> None:
        batch = self.inputs.query.shape[0]
        bias.accumulate(grads, d_scores.unflatten(0, (batch, -1)), *self._positions(piece), self.inputs.keys)

    def _positions(self, piece: Piece) -> tuple[Tensor, Tensor]:
        device = self.k.device
        q = positions(self.rows, self.inputs.offset, device).unsqueeze(-1)
        return q, positions(piece.keys, 0, device).unsqueeze(-2)

    def _spread(self, tensor: Tensor) -> Tensor:
        """Something that broadcasts to (B, H, rows, keys) as one that broadcasts to this group's (heads, rows,
        keys)."""
        if tensor.ndim <= 2:
            return tensor
        if tensor.ndim == 3:
            tensor = tensor.unsqueeze(0)
        if tensor.shape[:2] == (1, 1):
            return tensor[0]
        # index rather than expand: only this group's heads are copied
        lanes = torch.arange(self.heads.start, self.heads.stop, device=tensor.device)
        row, head = lanes // self.inputs.heads, lanes % self.inputs.heads
        return tensor[row if tensor.shape[0] > 1 else row * 0, head if tensor.shape[1] > 1 else head * 0]

    def dead(self, piece: Piece) -> Tensor | None:
        """(heads|1, rows, 1) bool: rows with nothing to attend to; None where there are none."""
        width = size(piece.keys)
        if not any(edge.start == 0 and edge.stop == width for edge in piece.edges):
            return None
        dead = ~self._spread(piece.edges[0].keep).any(-1, keepdim=True)
        return None if dead.device.type == "cpu" and not bool(dead.any()) else dead


class _Result:
    """Output and log-sum-exp under construction; merges parts of a row in float32 (float64 for float64)."""

    def __init__(self, q: Tensor, width: int) -> None:
        # every row stands in a tile, so every row is written
        self.output = torch.empty(*q.shape[:2], width, dtype=q.dtype, device=q.device)
        self.lse: Tensor | None = None
        self._sum = self.output
        self._merging = False

    def need_lse(self) -> None:
        if self.lse is None:
            shape, wide = self.output.shape[:2], _wide(self.output.dtype)
            self.lse = torch.full(shape, -torch.inf, dtype=wide, device=self.output.device)

    def write(self, rows: Index, heads: slice, out: Tensor, lse: Tensor | None = None) -> None:
        _put(self._sum, heads, rows, out)
        if self.lse is not None and lse is not None:
            _put(self.lse, heads, rows, lse)

    def merge(self, rows: Index, heads: slice, out: Tensor, lse: Tensor) -> None:
        """Combine with what these rows hold: weights e^(lse - lse') of both (Milakov & Gimelshein 2018, equation 4)."""
        self.need_lse()
        assert self.lse is not None
        if not self._merging:
            # a walk either merges or writes: nothing is lost
            self._merging = True
            self._sum = torch.zeros_like(self.output, dtype=out.dtype)
        before = _take(self.lse, heads, rows)
        after = torch.logaddexp(before, lse)
        ground = after.masked_fill(after == -torch.inf, 0.0)
        held = _take(self._sum, heads, rows)
        mixed = held * (before - ground).exp_().unsqueeze(-1) + out * (lse - ground).exp_().unsqueeze(-1)
        _put(self._sum, heads, rows, mixed)
        _put(self.lse, heads, rows, after)

    def finish(self) -> Tensor:
        return self._sum.to(self.output.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _is_plain(tile: Tile, inputs: Inputs) -> bool:
    """A softmax over one piece gives the tile's result, and no log-sum-exp is wanted."""
    return tile.once and len(tile.pieces) == 1 and not inputs.need_lse


def _dropout_seed(seed: int, number: int, heads: slice) -> int:
    # hashed, because PyTorch's CPU generator reads only the low 32 bits
    digest = hashlib.blake2b(struct.pack("<3Q", seed, number, heads.start), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def head_groups(walk: Walk, tile: Tile, kv_heads: int) -> Iterator[slice]:
    """Ranges of key heads in groups whose scores stay within the walk's bound."""
    if not tile.pieces:
        return
    per_head = walk.inputs.groups * size(tile.rows) * max(size(piece.keys) for piece in tile.pieces)
    # a learned bias sums its gradient over the batch, which wants all heads at once
    step = kv_heads if walk.bias_grad else max(1, min(kv_heads, walk.scores // max(1, per_head)))
    for start in range(0, kv_heads, step):
        yield slice(start, min(start + step, kv_heads))


def _take(tensor: Tensor, heads: slice, index: Index) -> Tensor:
    """Rows `index` of (BH, N, ...) or (BH, N) for a group of heads."""
    if isinstance(index, slice):
        return tensor[heads, index]
    if index.ndim == 1:
        return tensor[heads].index_select(1, index)
    return tensor[heads].gather(1, _per_head(index, heads, tensor))


def _put(tensor: Tensor, heads: slice, index: Index, values: Tensor) -> None:
    if isinstance(index, slice):
        tensor[heads, index] = values
    elif index.ndim == 1:
        tensor[heads].index_copy_(1, index, values.to(tensor.dtype))
    else:
        tensor[heads].scatter_(1, _per_head(index, heads, tensor), values.to(tensor.dtype))


def _add(tensor: Tensor, heads: slice, index: Index, values: Tensor) -> None:
    if isinstance(index, slice):
        tensor[heads, index] += values
    elif index.ndim == 1:
        tensor[heads].index_add_(1, index, values.to(tensor.dtype))
    else:
        tensor[heads].scatter_add_(1, _per_head(index, heads, tensor), values.to(tensor.dtype))


def _per_head(index: Tensor, heads: slice, like: Tensor) -> Tensor:
    flat = index.flatten(0, 1)[heads]
    return flat if like.ndim == 2 else flat.unsqueeze(-1).expand(-1, -1, like.shape[2])
