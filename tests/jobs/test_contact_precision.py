"""Precision by its definition: ties in no order, samples standing for all pairs, proteins held out by likeness."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from esm_peer import protein
from longlens.jobs.contact_precision import (
    ScoredPairs,
    expected_precision,
    held_out_folds,
    measure_precision,
    similar_groups,
)

ONES = np.ones(6)


def test_ties_count_as_the_mean_over_their_orders():
    scores = np.array([3.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    truth = np.array([False, True, True, False, False, True])
    for count in range(1, 7):
        orders = [[0, *middle, 5] for middle in permutations([1, 2, 3, 4])]
        literal = np.mean([truth[order[:count]].mean() for order in orders])
        assert expected_precision(scores, truth, ONES, count) == pytest.approx(literal)


def test_scores_that_tell_nothing_give_the_share_of_contacts():
    truth = np.arange(100) < 7
    for order in (slice(None), slice(None, None, -1)):
        assert expected_precision(np.zeros(100), truth[order], np.ones(100), 10) == pytest.approx(0.07)


def test_a_sample_counts_as_the_pairs_that_it_stands_for():
    generator = np.random.default_rng(0)
    truth = np.arange(20_000) < 200
    scores = generator.normal(size=20_000) + 2.0 * truth
    whole = expected_precision(scores, truth, np.ones(20_000), 300)
    kept = np.concatenate([np.arange(200), 200 + generator.permutation(19_800)[:4950]])
    weights = np.where(truth[kept], 1.0, 4.0)
    assert expected_precision(scores[kept], truth[kept], weights, 300) == pytest.approx(whole, abs=0.05)
    # without the weights a quarter of the others would compete
    assert expected_precision(scores[kept], truth[kept], np.ones(len(kept)), 300) > whole + 0.1


def test_proteins_without_contacts_at_a_separation_are_left_out():
    pairs = np.array([[0, 6], [0, 30], [1, 40]])
    one = ScoredPairs(3, pairs, np.array([True, False, True]), np.ones(3), np.array([3.0, 2.0, 1.0]))
    two = ScoredPairs(1, pairs, np.array([True, False, False]), np.ones(3), np.array([0.0, 2.0, 1.0]))
    near, far = measure_precision([one, two], 6), measure_precision([one, two], 24)
    assert near is not None
    assert far is not None
    assert (near.mean, near.lowest, near.highest, near.proteins) == pytest.approx((1 / 3, 0.0, 2 / 3, 2))
    assert near.chance == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert (far.mean, far.proteins, far.chance) == (0.5, 1, 0.5)
    assert measure_precision([two], 24) is None


def test_chains_that_are_nearly_alike_are_one_group():
    a, b = protein(120, 1), protein(120, 2)
    changed = a[:40] + ("W" if a[40] != "W" else "A") + a[41:100]
    assert similar_groups([a, b, changed, a, "MKT", "MKT"]) == [0, 1, 0, 0, 4, 4]


def test_each_protein_is_held_out_once_with_its_group():
    groups = [0, 1, 0, 2, 3, 4, 5, 6, 7, 1]
    folds = list(held_out_folds(groups, 0))
    assert len(folds) == 5
    assert (np.sum(folds, 0) == 1).all()
    for fold in folds:
        assert fold[0] == fold[2]
        assert fold[1] == fold[9]
        assert 0 < fold.sum() < len(groups)
    assert len(list(held_out_folds([0, 1], 0))) == 2
    assert list(held_out_folds([3, 3], 0)) == []
