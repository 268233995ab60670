"""Locality-sensitive hashing: queries meet the keys that fall into the same bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from longlens.errors import MethodError
from longlens.ops.inputs import Inputs
from longlens.ops.masks import Rule
from longlens.ops.method import LARGEST_SEED, Method, Tiled, check_count
from longlens.ops.outputs import AttentionOutput
from longlens.ops.reference import softmax_attention
from longlens.ops.sparse.pattern import Pattern, SparseMethod
from longlens.ops.sparse.strata import Stratum, strata_tiles
from longlens.ops.tiles.engine import attend_tiles
from longlens.ops.tiles.grid import Edge, Piece, Tile, TileShape, sparse_shape, tile_elements
from longlens.ops.tiles.problem import TiledProblem

# under a causal mask the number of buckets must not tell the length
CAUSAL_BUCKETS = 64
# each round takes time and memory of its own; the paper uses up to 16
MOST_ROUNDS = 1024
# rows hashed at a time
ROWS = 8192


@final
@dataclass(frozen=True)
class LSH(SparseMethod):
    """LSH attention: exact softmax over pairs that share a hash bucket in any of `rounds` (Reformer, Kitaev et al.
    2020).

    Hash of x in a round: argmax over [x R; -x R] with R random (section 2, "Locality sensitive hashing"); many
    buckets are hashed as a product of two smaller hashes. A query at position p meets the keys j of its bucket whose
    rank among the bucket's keys is within `bucket` of p's own: at most 2 `bucket` pairs in a round. A pair met in
    several rounds counts once.

    Differences from the paper: queries and keys are not tied and a token may attend to itself; ranks count within the
    bucket, so that neither chunk borders nor the future decide who meets whom. `buckets` is, where None, the number
    of kept keys / `bucket`, and 64 under `is_causal`, where it must not depend on the length. Hashes are drawn from
    `seed`, the same for every head. Grouped heads are expanded. A non-finite key has no bucket: it reaches every query
    that the masks let see it. Time N rounds bucket, memory N.
    """

    rounds: int = 4
    bucket: int = 64
    buckets: int | None = None
    seed: int = 0
    name: ClassVar[str] = "lsh"

    def __post_init__(self) -> None:
        check_count("lsh", "rounds", self.rounds, 1, MOST_ROUNDS)
        check_count("lsh", "bucket", self.bucket)
        check_count("lsh", "seed", self.seed, 0, LARGEST_SEED)
        if self.buckets is not None:
            check_count("lsh", "buckets", self.buckets, 2)
            if self.buckets % 2:
                raise MethodError(f"lsh: expected an even number of buckets, got {self.buckets}")

    def localise(self, inputs: Inputs) -> list[tuple[Method, Inputs]]:
        """Each batch row by itself under a key mask, since the number of buckets follows from the kept keys."""
        if inputs.key_mask is None:
            return [(self, inputs)]
        return [(self, row) for row in inputs.rows()]

    def tiles(self, inputs: Inputs, shape: TileShape) -> Tiled:
        """The pairs that share a bucket."""
        return hashed_tiled(self, (), inputs, shape)

    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Exact softmax over the pairs that share a bucket."""
        return attend_hashed(self, (), inputs)

    def peak_elements(self, inputs: Inputs) -> int:
        """Hashes and orders of each round, keys expanded to every head, and the scores of one tile."""
        batch, heads, queries, width = inputs.query.shape
        hashes = self.rounds * 2 * (queries + inputs.keys) * batch * heads * 8 // inputs.query.element_size()
        expanded = batch * heads * inputs.keys * width if inputs.groups > 1 else 0
        return hashes + expanded + 2 * tile_elements(inputs, sparse_shape(inputs), 4 * self.bucket)

    def reference(self, inputs: Inputs) -> Tensor:
        """Softmax over the pairs that share a bucket, by definition."""
        return torch.cat([hashed_reference(self, (), part) for _, part in self.localise(inputs)])

    def united(self, patterns: tuple[Pattern, ...]) -> Method:
        """The pairs of the patterns and of the hashes."""
        return HashedUnion(patterns, self)


@final
@dataclass(frozen=True)
class HashedUnion(SparseMethod):
    """A union of patterns with LSH: `Window(64) | LSH()`."""

    members: tuple[Pattern, ...]
    hashed: LSH
    name: ClassVar[str] = "lsh"

    def localise(self, inputs: Inputs) -> list[tuple[Method, Inputs]]:
        """Each batch row by itself under a key mask, with the patterns' positions counted from its first kept key."""
        parts = [self.hashed.localise(inputs), *(_by_row(member, inputs) for member in self.members)]
        return [
            (HashedUnion(tuple(form for form, _ in members), self.hashed), part)
            for (_, part), *members in zip(*parts, strict=True)
        ]

    def refusals(self, inputs: Inputs) -> list[str]:
        """Whatever a member refuses."""
        return [reason for member in self.members for reason in member.refusals(inputs)]

    def tiles(self, inputs: Inputs, shape: TileShape) -> Tiled:
        """The pairs of any member."""
        return hashed_tiled(self.hashed, self.members, inputs, shape)

    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Exact softmax over the pairs of any member."""
        return attend_hashed(self.hashed, self.members, inputs)

    def reference(self, inputs: Inputs) -> Tensor:
        """Softmax over the union, by definition."""
        return torch.cat([
            hashed_reference(form.hashed, form.members, part)
            for form, part in self.localise(inputs) if isinstance(form, HashedUnion)
        ])  # fmt: skip

    def parts(self) -> tuple[SparseMethod, ...]:
        """The patterns and the hashes."""
        return (*self.members, self.hashed)

    def __str__(self) -> str:
        return "|".join(map(str, (*self.members, self.hashed)))


def _by_row(pattern: Pattern, inputs: Inputs) -> list[tuple[Method, Inputs]]:
    forms = pattern.localise(inputs)
    if inputs.key_mask is None or len(forms) == len(inputs.key_mask):
        return forms
    return [(forms[0][0], row) for row in inputs.rows()]


class _Round(NamedTuple):
    """One round's hashes: buckets and places in sorted order.

    `q_bucket` (B, H, Nq) and `k_bucket` (B, H, Nk); `k_rank` (B, H, Nk) is a key's place among keys sorted by bucket,
    then position, and `q_rank` (B, H, Nq) the place where the query would stand among them.
    """

    q_bucket: Tensor
    k_bucket: Tensor
    q_rank: Tensor
    k_rank: Tensor

    def allowed(self, reach: int, rows: Tensor, keys: Tensor) -> Tensor:
        """(B, H, rows, keys): same bucket, ranks within reach. `rows`, `keys` number queries and keys, (B, H, m)."""
        same = self.q_bucket.gather(2, rows).unsqueeze(3) == self.k_bucket.gather(2, keys).unsqueeze(2)
        distance = self.k_rank.gather(2, keys).unsqueeze(2) - self.q_rank.gather(2, rows).unsqueeze(3)
        return same & (distance >= -reach) & (distance < reach)


def attend_hashed(lsh: LSH, members: Sequence[Pattern], inputs: Inputs) -> AttentionOutput:
    """Exact softmax over the pairs of `members` and of the hashes."""
    inputs = _expanded(inputs)
    with torch.no_grad():
        rounds = _hash_rounds(lsh, inputs)
    shape = sparse_shape(inputs)
    strata = tuple(stratum for member in members for stratum in member.strata())
    return attend_tiles(
        TiledProblem(inputs, lambda shapes, _: _hashed_tiles(lsh, rounds, strata, shapes, shape), shape.scores)
    )


def hashed_tiled(lsh: LSH, members: Sequence[Pattern], inputs: Inputs, shape: TileShape) -> Tiled:
    """The pairs of `members` and of the hashes."""
    inputs = _expanded(inputs)
    strata = tuple(stratum for member in members for stratum in member.strata())
    return Tiled(inputs, _hashed_tiles(lsh, _hash_rounds(lsh, inputs), strata, inputs, shape))


def _hashed_tiles(
    lsh: LSH, rounds: list[_Round], strata: Sequence[Stratum], inputs: Inputs, shape: TileShape
) -> Iterator[Tile]:
    for tile in strata_tiles(strata, inputs, shape) if strata else ():
        yield tile._replace(once=False)
    for number in range(len(rounds)):
        yield from _round_tiles(lsh, rounds, number, strata, inputs, shape)


def hashed_reference(lsh: LSH, members: Sequence[Pattern], inputs: Inputs) -> Tensor:
    """Softmax over the pairs of `members` and of the hashes, by definition."""
    inputs = _expanded(inputs)
    batch, heads = inputs.query.shape[:2]
    rows = torch.arange(inputs.queries).expand(batch, heads, -1)
    keys = torch.arange(inputs.keys).expand(batch, heads, -1)
    rounds = _hash_rounds(lsh, inputs)

    class Pairs(Rule):
        """Pairs that any round or member allows."""

        def allowed(self, q: Tensor, k: Tensor, n: int) -> Tensor:
            keep = rounds[0].allowed(lsh.bucket, rows, keys)
            for other in rounds[1:]:
                keep = keep | other.allowed(lsh.bucket, rows, keys)
            for member in members:
                keep = keep | member.allowed(q, k, n)
            return keep

    return softmax_attention(inputs, Pairs())[0]


def _expanded(inputs: Inputs) -> Inputs:
    """Every query head with keys of its own, since the tiles gather keys by head."""
    if inputs.groups == 1:
        return inputs
    key, value = (tensor.repeat_interleave(inputs.groups, 1) for tensor in (inputs.key, inputs.value))
    return replace(inputs, key=key, value=value)


def _hash_rounds(lsh: LSH, inputs: Inputs) -> list[_Round]:
    kept = inputs.keys if inputs.key_mask is None else int(inputs.key_mask.sum())
    buckets = lsh.buckets or (CAUSAL_BUCKETS if inputs.causal else _bucket_count(kept / lsh.bucket))
    device, n = inputs.key.device, inputs.keys
    q_place = torch.arange(inputs.queries, device=device) + inputs.offset
    k_place = torch.arange(n, device=device)
    rounds = []
    for number in range(lsh.rounds):
        q_bucket, k_bucket = (_hash(t, buckets, lsh.seed, number) for t in (inputs.query, inputs.key))
        if inputs.key_mask is not None:
            k_bucket = k_bucket.masked_fill(~inputs.key_mask.unsqueeze(1), buckets)
        # one number that sorts by bucket, then position; a query stands just before the key at its own position
        sorted_keys, order = (k_bucket * (n + 1) + k_place).sort(-1)
        k_rank = torch.empty_like(order).scatter_(2, order, k_place.expand_as(order))
        q_rank = torch.searchsorted(sorted_keys, q_bucket * (n + 1) + q_place.clamp(0, n))
        rounds.append(_Round(q_bucket, k_bucket, q_rank, k_rank))
    return rounds


def _bucket_count(wanted: float) -> int:
    """An even number near `wanted`; above 64 a product of two even numbers, so that hashing stays cheap."""
    if wanted <= 64:
        return max(2, 2 * round(wanted / 2))
    small = 2 * round(wanted**0.5 / 2)
    return small * 2 * round(wanted / small / 2)


def _hash(x: Tensor, buckets: int, seed: int, number: int) -> Tensor:
    """(B, H, N) int64 in 0..buckets - 1; a product of two hashes where there are more than 64 buckets."""
    sizes: tuple[int, ...] = (buckets,)
    if buckets > 64:
        small = next(size for size in range(2 * int(buckets**0.5 / 2 + 1), 1, -2) if buckets % size == 0)
        if buckets // small % 2 == 0:
            sizes = (small, buckets // small)
    out = torch.zeros(x.shape[:3], dtype=torch.int64, device=x.device)
    for factor, count in enumerate(sizes):
        directions = _directions(x.shape[3], count // 2, seed, 2 * number + factor).to(x.device)
        for start in range(0, x.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            near = x[:, :, rows].float() @ directions
            out[:, :, rows] = out[:, :, rows] * count + torch.cat([near, -near], -1).argmax(-1)
    return out


@lru_cache(64)
def _directions(width: int, count: int, seed: int, stream: int) -> Tensor:
    """(width, count) random directions, float32."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + stream)
    return torch.randn(width, count, generator=generator)


def _round_tiles(
    lsh: LSH, rounds: list[_Round], number: int, strata: Sequence[Rule], inputs: Inputs, shape: TileShape
) -> Iterator[Tile]:
    """One round: queries in sorted order, in blocks, and the run of sorted keys that each block can meet."""
    now, n, nq = rounds[number], inputs.keys, inputs.queries
    mask = inputs.mask_rule()
    place = torch.arange(nq, device=inputs.query.device)
    # by bucket, then position: neighbours share keys
    q_order = (now.q_bucket * (nq + 1) + place).argsort(-1)
    k_order = torch.empty_like(now.k_rank).scatter_(
        2, now.k_rank, torch.arange(n, device=place.device).expand_as(now.k_rank)
    )
    for start in range(0, nq, shape.rows):
        rows = q_order[:, :, start : start + shape.rows]
        ranks = now.q_rank.gather(2, rows)
        first = (ranks[..., 0] - lsh.bucket).clamp(min=0)
        last = (ranks[..., -1] + lsh.bucket).clamp(max=n)
        pieces = []
        for begin in range(0, int((last - first).max()), shape.keys):
            wide = min(shape.keys, int((last - first).max()) - begin)
            ranked = first.unsqueeze(-1) + begin + torch.arange(wide, device=place.device)
            inside = ranked < last.unsqueeze(-1)
            keys = k_order.gather(2, ranked.clamp(max=n - 1))
            keep = now.allowed(lsh.bucket, rows, keys) & inside.unsqueeze(2)
            for before in rounds[:number]:
                keep &= ~before.allowed(lsh.bucket, rows, keys)
            q, k = (rows + inputs.offset).unsqueeze(3), keys.unsqueeze(2)
            for stratum in strata:
                keep &= ~stratum.allowed(q, k, n)
            if mask is not None:
                keep &= mask.allowed(q, k, n)
            pieces.append(Piece(keys, (Edge(0, wide, keep),)))
        yield Tile(rows, tuple(pieces), once=lsh.rounds == 1 and not strata)
