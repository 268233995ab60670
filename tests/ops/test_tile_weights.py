"""Weights of a tile from a known log-sum-exp: equal to a softmax over all keys, with a factor to each head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longlens.ops.biases import RelativePosition
from longlens.ops.tiles.scratch import Scratch
from longlens.ops.tiles.weights import KnownWeights, pair_weights, tile_weights

HEADS, TOKENS, WIDTH, SCALE = 3, 40, 8, 0.7


def problem(dtype):
    torch.manual_seed(0)
    query, key = (2 * torch.randn(2, HEADS, TOKENS, WIDTH)).to(dtype)
    scores = SCALE * query.double() @ key.double().mT
    factor = torch.tensor([0.5, 1.0, 3.0])
    wide = torch.promote_types(dtype, torch.float32)
    known = KnownWeights(query, key, scores.logsumexp(-1).to(wide), SCALE, factor)
    return known, scores.softmax(-1) * factor.double().view(-1, 1, 1)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 3e-6), (torch.float64, 1e-13), (torch.bfloat16, 3e-6), (torch.float16, 3e-6)]
)
def test_tiles_equal_the_softmax(dtype, error):
    known, expected = problem(dtype)
    rows, columns, scratch = slice(5, 21), slice(30, 40), Scratch(torch.device("cpu"))
    weights = tile_weights(known.rows(rows), known.columns(columns), scratch)
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    assert (weights.double() - expected[:, rows, columns]).abs().max() <= error * 3
    everything = slice(0, TOKENS)
    i, j = torch.tensor([0, 7, 39, 7]), torch.tensor([3, 7, 0, 1])
    pairs = pair_weights(known.rows(everything)[:, i], known.columns(everything)[:, j])
    assert (pairs.double() - expected[:, i, j]).abs().max() <= error * 3


def test_a_tile_uses_the_memory_of_the_one_before():
    known, _ = problem(torch.float32)
    scratch = Scratch(torch.device("cpu"))
    first = tile_weights(known.rows(slice(0, 20)), known.columns(slice(0, 20)), scratch)
    second = tile_weights(known.rows(slice(20, 40)), known.columns(slice(0, 20)), scratch)
    assert first.data_ptr() == second.data_ptr()


def test_a_row_without_keys_has_weights_of_zero():
    known, _ = problem(torch.float32)
    lse = known.lse.clone()
    lse[1, 4] = -torch.inf
    bare = KnownWeights(known.query, known.key, lse, SCALE)
    everything = slice(0, TOKENS)
    weights = tile_weights(bare.rows(everything), bare.columns(everything), Scratch(torch.device("cpu")))
    assert torch.equal(weights[1, 4], torch.zeros(TOKENS))
    sums = weights.sum(-1).index_put((torch.tensor(1), torch.tensor(4)), torch.tensor(1.0))
    torch.testing.assert_close(sums, torch.ones(HEADS, TOKENS))


def test_a_bias_of_distances_is_part_of_the_weights():
    known, _ = problem(torch.float64)
    bias = RelativePosition(torch.randn(5, 32, dtype=torch.float64), "t5", max_distance=20)
    heads = torch.tensor([4, 0, 2])
    place = torch.arange(TOKENS)
    scores = SCALE * known.query @ known.key.mT + bias.tile(place.unsqueeze(1), place.unsqueeze(0), TOKENS)[heads]
    biased = replace(known, lse=scores.logsumexp(-1), bias=bias, heads=heads)
    assert known.factor is not None
    expected = scores.softmax(-1) * known.factor.view(-1, 1, 1)
    for rows, columns in ((slice(5, 21), slice(30, 40)), (slice(30, 40), slice(0, 7)), (slice(0, 9), slice(0, 9))):
        tile = tile_weights(
            biased.rows(rows), biased.columns(columns), Scratch(torch.device("cpu")), biased.bits(rows, columns)
        )
        torch.testing.assert_close(tile, expected[:, rows, columns])
    i, j = torch.tensor([0, 7, 39, 7]), torch.tensor([3, 7, 0, 1])
    everything = slice(0, TOKENS)
    pairs = pair_weights(
        biased.rows(everything)[:, i], biased.columns(everything)[:, j], biased.pair_bits(i, j)
    )  # fmt: skip
    torch.testing.assert_close(pairs, expected[:, i, j])
