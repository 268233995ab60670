"""Attention whose weights are inner products of features: the sums over keys become one small state.

    o_i = sum_j w_ij v_j / sum_j w_ij,    w_ij = phi(q_i) . phi(k_j)  over the allowed keys

Since phi(q_i) leaves the sum, sum_j phi(k_j) [v_j, 1] is a matrix (F, Dv + 1) that serves every query. Bidirectional:
one pass over the keys, one over the queries. Causal: chunks; the state holds all earlier chunks, pairs inside a chunk
are formed. Both go by blocks that stay in cache, and under autograd each block is recomputed in the backward pass, so
that the features of the whole sequence never exist: memory is O(N (D + Dv) + F Dv), and for the backward pass of
causal attention, which keeps the state of every chunk, O(N (D + Dv) + N F Dv / C).

Features may come with a logarithm a_j, phi(k_j) e^{a_j} being meant. The state is then kept relative to the largest
a_j so far (as in the online softmax), and a row of a causal chunk relative to the largest a_j that it sees. These
factors cancel exactly in the quotient, are constants to autograd, and never depend on later keys, other heads or other
batch rows.

Letters: L = B Hkv key heads of all batch rows, G query heads to a key head, m queries and n keys of a block, F
features, C tokens of a chunk.
Blocks of tokens are (B, Hkv, G, m, D); keys and values have G = 1. "Sums" are numerators with the normaliser as last
column, (B, Hkv, G, m, Dv + 1); a state is (L, F, Dv + 1) and its logarithm (L, 1, 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longlens.ops.approximate.blocks import block_elements, by_pieces, compute_dtype, grouped, join, recompute
from longlens.ops.inputs import Inputs

# stands for "no key yet" among logarithms; finite, so that differences of it are not NaN
NO_KEY = -1e30
# a normaliser below this has lost terms to underflow in float32
UNDERFLOW = 1e-25

Sums = tuple[Tensor, Tensor | None]
State = tuple[Tensor | None, Tensor | None]


class Features(ABC):
    """A feature map phi, with everything it needs bound to one dtype, device and batch."""

    dtype: torch.dtype

    @abstractmethod
    def query(self, block: Tensor, start: int) -> Sums:
        """Features (B, Hkv, G, m, F) of the queries from `start` on, and their logarithm (..., m, 1) or None.

        Without the logarithm they are known up to a factor to each row, which the normaliser cancels.
        """

    @abstractmethod
    def key(self, block: Tensor, start: int) -> Sums:
        """Features (B, Hkv, 1, n, F) of the keys from `start` on, and their logarithm (..., n, 1) or None for 0."""

    def pairs(self, query: Tensor, key: Tensor, phi_q: Tensor, phi_k: Tensor) -> Tensor:
        """phi(q) . phi(k) for the pairs of a chunk, (L, G m, n); `query` (L, G m, D), `key` (L, n, D)."""
        return phi_q @ phi_k.mT


Build = Callable[[Inputs, torch.dtype], Features]
Make = Callable[[Inputs, torch.dtype, int], Iterator[Sums]]


def feature_attention(inputs: Inputs, build: Build, width: int, underflows: bool = True) -> Tensor:
    """Attention by the `width` features that `build` makes, (B, H, Nq, Dv) in the inputs' dtype; no key gives 0."""

    def make(part: Inputs, dtype: torch.dtype, rows: int) -> Iterator[Sums]:
        features = build(part, dtype)
        return causal_sums(part, features, width) if part.causal else full_sums(part, features, rows)

    return attend_sums(inputs, make, width, underflows)


def attend_sums(inputs: Inputs, make: Make, width: int, underflows: bool = True) -> Tensor:
    """What `make(part, dtype, rows)` yields, in order of queries, normalised: (B, H, Nq, Dv) in the inputs' dtype.

    `underflows` says that a normaliser near 0 is no true 0 where a row sees a key: such rows are taken in float64.
    """
    batch, heads, rows = _plan(inputs, width)

    def run(part: Inputs, into: Tensor | None) -> Tensor:
        def blocks(dtype: torch.dtype, lost: list[Tensor]) -> Iterator[Tensor]:
            sums = _watch(make(part, dtype, rows), part, lost)
            return (normalise(block).to(part.query.dtype) for block, _ in sums)

        lost: list[Tensor] = []
        output = join(blocks(compute_dtype(part), lost), 3, into)
        if not underflows or part.query.dtype == torch.float64:
            return output
        low = torch.cat(lost, 3)
        if not bool(low.any()):
            return output
        again = join(blocks(torch.float64, []), 3, None)
        output = torch.where(low.unsqueeze(-1), again, output)
        return output if into is None else into.copy_(output)

    return by_pieces(inputs, batch, heads, run)


def _plan(inputs: Inputs, width: int) -> tuple[int, int, int]:
    """Batch rows and key heads to work on together, and queries of a block."""
    room = block_elements(torch.device(inputs.device_type)) // (max(width, inputs.value.shape[3] + 1) * inputs.groups)
    key_heads = max(1, room // (chunk_length(width) if inputs.causal else 128))
    heads = min(inputs.key.shape[1], key_heads)
    batch = min(inputs.query.shape[0], max(1, key_heads // heads))
    return batch, heads, max(16, room // (batch * heads))


def chunk_length(width: int) -> int:
    """Tokens of a causal chunk: F / 2, so that states kept for the backward pass cost about 2 Dv a token."""
    return min(512, max(128, width // 2))


def scratch_elements(inputs: Inputs, width: int) -> int:
    """Elements that a forward pass needs beyond inputs and output, in the inputs' dtype."""
    batch, heads, rows = _plan(inputs, width)
    if inputs.causal:
        rows = chunk_length(width)
    key_heads, wide = batch * heads, inputs.value.shape[3] + 1
    rows = min(rows, max(inputs.queries, inputs.keys))
    each = 2 * width + 2 * wide + (3 * rows if inputs.causal else 0)
    elements = key_heads * (rows * inputs.groups * each + 2 * width * wide)
    return elements * compute_dtype(inputs).itemsize // inputs.query.element_size()


def _watch(sums: Iterator[Sums], inputs: Inputs, lost: list[Tensor]) -> Iterator[Sums]:
    """Pass sums on, noting in `lost` the rows that see a key and have lost their normaliser to underflow."""
    mask, start = inputs.key_mask, inputs.offset
    for block, log in sums:
        low = block.detach()[..., -1] < UNDERFLOW
        if inputs.causal:
            position = torch.arange(start, start + block.shape[3], device=low.device)
            first = 0 if mask is None else mask.long().argmax(1)[:, None, None, None]
            low = low & (position >= first)
            start += block.shape[3]
        if mask is not None:
            low = low & mask.any(1)[:, None, None, None]
        lost.append(low)
        yield block, log


def normalise(sums: Tensor) -> Tensor:
    """Numerators over the normaliser; 0 where it is 0."""
    total = sums[..., -1:]
    return sums[..., :-1] / torch.where(total == 0, 1.0, total)


def full_sums(inputs: Inputs, features: Features, rows: int) -> Iterator[Sums]:
    """Sums over all keys for blocks of `rows` queries, and their logarithm where the features have one."""
    query, key, value, mask = grouped(inputs)
    tall = rows * inputs.groups
    state: State = (None, None)
    masks = [None] * inputs.keys if mask is None else mask.split(tall, 3)
    start = 0
    for k, v, keep in zip(key.split(tall, 3), value.split(tall, 3), masks, strict=False):
        state = merge_states(state, recompute(_fold, features, k, v, keep, start))
        start += k.shape[3]
    yield from _read_all(features, state, query, rows, 0)


def causal_sums(inputs: Inputs, features: Features, width: int) -> Iterator[Sums]:
    """Sums over the keys at or before each query, in order of queries; their logarithm where the features have one.

    Chunks are cut by position, so that the queries and keys of a chunk stand at the same places.
    """
    query, key, value, mask = grouped(inputs)
    length = chunk_length(width)
    edges = [min(max(at - inputs.offset, 0), inputs.queries) for at in (*range(0, inputs.keys, length), inputs.keys)]
    sizes = [stop - start for start, stop in pairwise(edges)]
    early, *chunks, late = query.split([edges[0], *sizes, inputs.queries - edges[-1]], 3)
    if early.shape[3]:
        # zeros that are still part of the graph
        nothing = early[..., :0].sum() + key[..., :0].sum() + value[..., :0].sum()
        zeros = early.new_zeros((*early.shape[:4], value.shape[4] + 1), dtype=features.dtype) + nothing
        yield zeros, zeros[..., -1:] + NO_KEY
    state: State = (None, None)
    q_start, k_start = edges[0], 0
    masks = [None] * len(chunks) if mask is None else mask.split(length, 3)
    for q, k, v, keep in zip(chunks, key.split(length, 3), value.split(length, 3), masks, strict=True):
        if q.shape[3]:
            sums, log, *more = recompute(_step, features, *state, q, k, v, keep, q_start, k_start, inputs.offset)
            yield sums, log
        else:
            more = recompute(_fold, features, k, v, keep, k_start)
        state = merge_states(state, more)
        q_start, k_start = q_start + q.shape[3], k_start + k.shape[3]
    if late.shape[3]:
        yield from _read_all(features, state, late, length, q_start)


def _read_all(features: Features, state: State, query: Tensor, rows: int, start: int) -> Iterator[Sums]:
    total, most = state
    for q in query.split(rows, 3):
        sums, log = recompute(_read, features, total, q, start)
        yield sums, None if log is None or most is None else log + most.view(*q.shape[:2], 1, 1, 1)
        start += q.shape[3]


def _read(features: Features, state: Tensor, q: Tensor, start: int) -> Sums:
    phi, log = features.query(q.to(features.dtype), start)
    return like(flatten_heads(phi) @ state, q), log


def _fold(features: Features, k: Tensor, v: Tensor, keep: Tensor | None, start: int) -> Sums:
    phi, log = features.key(k.to(features.dtype), start)
    return _contribution(phi, log, v.to(features.dtype), keep)


def _step(
    features: Features,
    state: Tensor | None,
    most: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    q_start: int,
    k_start: int,
    offset: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One causal chunk: its sums and their logarithm, then what its keys add to the state."""
    q, k, v = (t.to(features.dtype) for t in (q, k, v))
    (phi_q, log_q), (phi_k, log_k) = features.query(q, q_start), features.key(k, k_start)
    rows, group = flatten_heads(phi_q), (q.shape[2], q.shape[3])
    weights = features.pairs(flatten_heads(q), flatten_heads(k), rows, flatten_heads(phi_k)).unflatten(1, group)
    at = torch.arange(q.shape[3], device=q.device).unsqueeze(1) + (q_start + offset)
    later = torch.arange(k_start, k_start + k.shape[3], device=q.device) > at
    before = None if state is None else rows @ state
    best = None
    if log_k is None:
        weights = weights.masked_fill(later, 0.0)
        values = augment(v, None if keep is None else keep.to(v.dtype))
    else:
        log = flatten_heads(_silence(log_k, keep)).mT.masked_fill(later, -torch.inf)
        best = log.detach().amax(-1, keepdim=True).clamp_min(NO_KEY)
        best = best if most is None else torch.maximum(best, most)
        weights = weights * (log - best).exp().unsqueeze(1)
        values = augment(v, None)
        if before is not None and most is not None:
            before = (before.unflatten(1, group) * (most - best).exp().unsqueeze(1)).flatten(1, 2)
    sums = weights.flatten(1, 2) @ values
    sums = like(sums if before is None else sums + before, q)
    log_sums = None if log_q is None or best is None else log_q + best.view(*q.shape[:2], 1, -1, 1)
    return sums, log_sums, *_contribution(phi_k, log_k, v, keep)


def merge_states(state: State, more: Sequence[Tensor | None]) -> State:
    """The state with a contribution added, relative to the larger of the two logarithms."""
    (total, most), (part, peak) = state, more
    if total is None or part is None:
        return part, peak
    if most is None or peak is None:
        return total + part, None
    top = torch.maximum(most, peak)
    return total * (most - top).exp() + part * (peak - top).exp(), top


def flatten_heads(block: Tensor) -> Tensor:
    """(B, Hkv, G, m, F) as (L, G m, F)."""
    return block.flatten(2, 3).flatten(0, 1)


def like(rows: Tensor, block: Tensor) -> Tensor:
    """(L, G m, F) with the leading axes of `block`, (B, Hkv, G, m, F)."""
    return rows.view(*block.shape[:4], rows.shape[-1])


def _silence(log: Tensor, keep: Tensor | None) -> Tensor:
    return log if keep is None else log.masked_fill(~keep, -torch.inf)


def augment(value: Tensor, weight: Tensor | None) -> Tensor:
    """[v_j, 1], times a weight to each key: (L, n, Dv + 1)."""
    if weight is None:
        return flatten_heads(torch.cat([value, value.new_ones(()).expand(*value.shape[:4], 1)], -1))
    return flatten_heads(torch.cat([value * weight, weight.expand(*value.shape[:4], 1)], -1))


def _contribution(phi: Tensor, log: Tensor | None, value: Tensor, keep: Tensor | None) -> Sums:
    """What a block of keys adds to the state, relative to e^peak: (L, F, Dv + 1), and peak (L, 1, 1)."""
    if log is None and keep is None:
        # the normaliser by itself: a product as wide as the values is faster than one with a column more
        rows = flatten_heads(phi)
        return torch.cat([rows.mT @ flatten_heads(value), rows.sum(1).unsqueeze(2)], -1), None
    if log is None:
        return flatten_heads(phi).mT @ augment(value, None if keep is None else keep.to(value.dtype)), None
    log = _silence(log, keep)
    peak = log.detach().amax(3, keepdim=True).clamp_min(NO_KEY)
    return flatten_heads(phi).mT @ augment(value, (log - peak).exp()), peak.view(-1, 1, 1)
