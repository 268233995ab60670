"""Sparse methods: exact softmax over the pairs of their patterns, whatever the masks, and no more pairs than that."""

from __future__ import annotations

import pytest
import torch
from compare import check, make

import longlens as ll
from longlens.errors import MaskError, MethodError, UnsupportedError
from longlens.ops.inputs import check_inputs
from longlens.ops.registry import parse_method
from longlens.ops.sparse.strata import strata_tiles
from longlens.ops.tiles.grid import sparse_shape
from longlens.ops.tiles.index import size

LAYOUT = tuple(tuple((5 * row + 3 * place) % 13 for place in range(3)) for row in range(13))
PATTERNS = [
    ll.Window(16),
    ll.Window(16, 0),
    ll.Window(3, 40),
    ll.Dilated(5, 3),
    ll.Global((0, 5, 77)),
    ll.Random(2, 16),
    ll.Strided(13),
    ll.Fixed(24, 3),
    ll.Fixed(128, 8),
    ll.BlockSparse(LAYOUT, block=16),
    ll.LSH(2, 8),
    ll.LSH(1, 16),
    ll.Longformer(16, (0, 50)),
    ll.BigBird(16, 2, 1),
    ll.BigBird(64),
    ll.Window(8) | ll.Dilated(6, 5) | ll.Random(1, 32),
    ll.Strided(9) | ll.Global((1,)),
    ll.Window(5) | ll.LSH(2, 8),
    ll.Strided(20) | ll.LSH(2, 8) | ll.BlockSparse(LAYOUT, block=16),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
STATIC = [pattern for pattern in PATTERNS if "lsh" not in str(pattern)]


@every_pattern
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (200, 200), (90, 150), (150, 90)])
def test_equals_the_definition(pattern, lengths, is_causal):
    check(pattern, *make(2, 4, 2, *lengths, 8, 12), is_causal=is_causal)


@every_pattern
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding(pattern, is_causal):
    """Left, right and inner padding: the definition, and the same numbers as without the padding."""
    query, key, value = make(3, 2, 2, 160, 160, 8)
    mask = torch.ones(3, 160, dtype=torch.bool)
    mask[0, :37] = False
    mask[1, 120:] = False
    mask[2, 50:60] = False
    output = check(pattern, query, key, value, key_mask=mask, is_causal=is_causal)
    for row, kept in ((0, slice(37, 160)), (1, slice(0, 120))):
        alone = (tensor[row : row + 1, :, kept] for tensor in (query, key, value))
        torch.testing.assert_close(
            output[row : row + 1, :, kept], ll.attention(*alone, method=pattern, is_causal=is_causal)
        )


@pytest.mark.parametrize("pattern", STATIC, ids=str)
def test_rules_and_biases(pattern):
    query, key, value = make(2, 2, 2, 120, 120, 8)
    check(pattern, query, key, value, attn_mask=ll.Prefix(50), bias=ll.Alibi(2))
    check(pattern, query, key, value, attn_mask=torch.rand(120, 120) > 0.3, is_causal=True)
    table = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    check(pattern, query, key, value, bias=ll.RelativePosition(table))


@every_pattern
def test_the_future_changes_nothing(pattern):
    """Not the future's values, and not its length either."""
    query, key, value = make(1, 2, 2, 180, 180, 8)
    if "lsh" not in str(pattern):
        # so that query and key positions stay what they are when tokens are cut off
        before = ll.attention(*(t[:, :, :100] for t in (query, key, value)), method=pattern, is_causal=True)
        after = ll.attention(query, key, value, method=pattern, is_causal=True)[:, :, :100]
        torch.testing.assert_close(after, before)
    changed = [tensor.clone() for tensor in (query, key, value)]
    for tensor in changed:
        tensor[:, :, 100:] *= 50
    first = ll.attention(query, key, value, method=pattern, is_causal=True)[:, :, :100]
    torch.testing.assert_close(ll.attention(*changed, method=pattern, is_causal=True)[:, :, :100], first)


@every_pattern
def test_string_form_reads_back(pattern):
    assert parse_method(str(pattern)) == pattern


@pytest.mark.parametrize("pattern", [ll.Window(16), ll.Window(40, 0), ll.Window(0, 3)], ids=str)
@pytest.mark.parametrize("lengths", [(1000, 1000), (700, 1000), (1000, 700)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_float32_windows_take_the_banded_route(pattern, lengths, is_causal):
    """The route through overlapping views covers most rows; grouped heads and odd strides included."""
    query, key, value = (tensor.detach().float() for tensor in make(2, 4, 2, *lengths, 16))
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = check_inputs(query, key, value, None, 0.0, is_causal, None, None, None, None, False)
    want = pattern.reference(inputs)
    torch.testing.assert_close(
        ll.attention(query, key, value, method=pattern, is_causal=is_causal).double(), want, rtol=1e-5, atol=1e-5
    )


def computed_pairs(pattern, length: int) -> int:
    inputs = check_inputs(*(torch.empty(1, 1, length, 1),) * 3, None, 0.0, False, None, None, None, None, False)
    shape = sparse_shape(inputs)
    return sum(
        size(tile.rows) * size(piece.keys)
        for tile in strata_tiles(pattern.strata(), inputs, shape)
        for piece in tile.pieces
    )


@pytest.mark.parametrize(
    ("pattern", "pairs"),
    [
        (ll.Window(256), lambda n: n * 513),
        (ll.Dilated(64, 8), lambda n: n * 129),
        (ll.BigBird(64), lambda n: n * 64 * 7),
        (ll.Longformer(256), lambda n: n * 514),
        (ll.Strided(128), lambda n: n * (257 + n / 128)),
        (ll.Fixed(128, 8), lambda n: n * (128 + n / 128 * 8)),
    ],
    ids=lambda value: str(value) if hasattr(value, "strata") else "",
)
def test_no_more_pairs_than_the_tiles_need(pattern, pairs):
    """At most half as many again as the pattern holds, at two lengths: work grows as the pattern does."""
    for length in (8192, 16384):
        assert computed_pairs(pattern, length) <= 1.5 * pairs(length)


def test_wrong_parameters_are_named():
    for build, word in [
        (lambda: ll.Window(-1), "left"),
        (lambda: ll.Window(4.5), "left"),
        (lambda: ll.Global((-1,)), "tokens"),
        (lambda: ll.Global("first"), "tokens"),
        (lambda: ll.Random(block=0), "block"),
        (lambda: ll.Fixed(8, 9), "columns"),
        (lambda: ll.BlockSparse(((0, -1),)), "layout"),
        (lambda: ll.LSH(buckets=3), "even"),
        (lambda: ll.Window(4) | ll.Exact(), "unites"),
        (lambda: ll.LSH() | ll.LSH(), "rounds"),
    ]:
        with pytest.raises(MethodError, match=word):
            build()


def test_a_short_layout_is_refused():
    query, key, value = make(1, 1, 1, 100, 100, 4)
    with pytest.raises(UnsupportedError, match="reach 32 of 100"):
        ll.attention(query, key, value, method=ll.BlockSparse(((0,), (1,)), block=16))


def test_a_short_layout_is_refused_as_a_mask_too():
    tensors = [torch.randn(1, 1, 64, 4) for _ in range(3)]
    with pytest.raises(MaskError, match="a layout that reaches every query, got 2 blocks of 16 for a query at"):
        ll.attention(*tensors, attn_mask=ll.BlockSparse(((0,), (1,)), 16))


def test_a_bool_layout():
    grid = torch.rand(7, 7) > 0.5
    method = ll.BlockSparse(grid, block=16)
    assert method == ll.BlockSparse(tuple(tuple(row.nonzero().flatten().tolist()) for row in grid), 16)


def test_many_global_tokens_stay_sparse():
    """Global tokens spread over the sequence must not widen every block of rows to all keys."""
    pattern = ll.Window(32) | ll.Global(tuple(range(0, 8192, 128)))
    assert computed_pairs(pattern, 8192) <= 1.5 * 8192 * (65 + 2 * 64)


def test_hashing_finds_near_keys():
    """A query meets the key that points its way nearly always, and a random other one seldom."""
    key = torch.randn(1, 1, 2048, 32)
    query = key + 0.1 * torch.randn_like(key)
    found = ll.attention(query * 50, key, torch.eye(2048)[None, None], method=ll.LSH(4, 32)).squeeze()
    assert (found.argmax(1) == torch.arange(2048)).float().mean() > 0.95
    assert (found > 0).float().mean() < 0.2


@every_pattern
def test_a_batch_row_without_keys_is_zero(pattern):
    """Beside a row with keys, with and without log-sum-exp, gradients included (`check` compares them)."""
    query, key, value = make(2, 4, 2, 40, 40, 8)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1] = False
    output = check(pattern, query, key, value, key_mask=mask)
    assert not output[1].any()


@pytest.mark.parametrize(("pattern", "length"), [(ll.Window(2100), 4400), (ll.Window(4095, 0), 4300)], ids=str)
def test_gradients_of_windows_wider_than_a_piece(pattern, length):
    """The fast forward route keeps no log-sum-exp, which the backward pass of rows in several pieces needs."""
    tensors = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3)]
    causal = pattern.right == 0
    ours = torch.autograd.grad(ll.attention(*tensors, method=pattern, is_causal=causal).square().sum(), tensors)
    want = torch.autograd.grad(
        ll.attention(*tensors, pattern, is_causal=causal, method="exact:blockwise").square().sum(), tensors
    )
    for got, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_any_strides():
    query, key, value = (torch.randn(1, 2, 16, 500).transpose(2, 3) for _ in range(3))
    want = ll.attention(query.contiguous(), key.contiguous(), value.contiguous(), method="window:16")
    torch.testing.assert_close(ll.attention(query, key, value, method="window:16"), want)


def test_queries_before_every_key():
    check(ll.Dilated(1, 1000), *make(1, 2, 1, 20, 10, 4))


def test_a_union_refuses_what_a_member_refuses():
    query, key, value = make(1, 1, 1, 64, 64, 4)
    with pytest.raises(UnsupportedError, match="reach 16 of 64"):
        ll.attention(query, key, value, method=ll.BlockSparse(((0,), (1,)), 8) | ll.Window(2))
