"""Measures are those of scikit-learn and SciPy, also with weights; intervals resample clusters."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn import metrics as sk

from longlens.finetuning.metrics import measure_all, measures
from longlens.finetuning.saved import choose_threshold, decide
from longlens.finetuning.targets import Targets, parse_task

VALUES = Targets(parse_task("sequence_to_value"), [], ())


def classes(count):
    return Targets(parse_task("sequence_to_class"), [], tuple("abcdefgh"[:count]))


def repeated(weights, *arrays):
    """Arrays with each row as often as its weight says."""
    return [np.repeat(array, weights.astype(int), axis=0) for array in arrays]


@pytest.mark.parametrize("count", [2, 4])
def test_measures_of_classes(count):
    draw = np.random.default_rng(count)
    truth = draw.integers(0, count, 200).astype(float)
    outputs = np.round(draw.dirichlet(np.ones(count), 200), 2)
    outputs[np.arange(200), truth.astype(int)] += 0.3
    predicted = outputs.argmax(1).astype(float)
    weights = draw.integers(0, 4, 200).astype(float)
    true, chosen, scores = repeated(weights, truth, predicted, outputs)
    if count == 2:
        area = sk.average_precision_score(true, scores[:, 1])
    else:
        area = np.mean([sk.average_precision_score(true == number, scores[:, number]) for number in range(count)])
    expected = {
        "mcc": sk.matthews_corrcoef(true, chosen), "macro_f1": sk.f1_score(true, chosen, average="macro"),
        "pr_auc": area, "accuracy": sk.accuracy_score(true, chosen),
    }  # fmt: skip
    found = {name: measure(weights) for name, measure in measures(classes(count), truth, outputs, predicted).items()}
    assert found == pytest.approx(expected, abs=1e-12)


def test_measures_of_values():
    draw = np.random.default_rng(0)
    truth = np.round(draw.normal(size=100), 1)
    outputs = np.round(truth + draw.normal(size=100), 1)[:, None]
    weights = draw.integers(0, 4, 100).astype(float)
    true, scores = repeated(weights, truth, outputs[:, 0])
    found = {name: measure(weights) for name, measure in measures(VALUES, truth, outputs, outputs[:, 0]).items()}
    expected = {"spearman": spearmanr(true, scores).statistic, "rmse": sk.root_mean_squared_error(true, scores)}
    assert found == pytest.approx(expected, abs=1e-12)


def test_what_is_not_defined():
    constant = np.zeros((10, 1))
    found = measure_all(VALUES, np.arange(10.0), constant, constant[:, 0], np.arange(10), 0)
    assert np.isnan(found["spearman"].value)
    assert found["spearman"].low is None
    one = measure_all(VALUES, np.arange(10.0), np.arange(10.0)[:, None], np.arange(10.0), np.zeros(10, int), 0)
    assert (one["spearman"].value, one["spearman"].low) == (pytest.approx(1.0), None)


def test_intervals_are_those_of_clusters_not_of_rows():
    """A hundred copies of ten proteins tell no more than ten proteins."""
    draw = np.random.default_rng(0)
    truth, outputs = draw.normal(size=10), draw.normal(size=10)
    alone = measure_all(VALUES, truth, outputs[:, None], outputs, np.arange(10), 3)["rmse"]
    many = measure_all(
        VALUES, np.tile(truth, 100), np.tile(outputs, 100)[:, None], np.tile(outputs, 100),
        np.tile(np.arange(10), 100), 3,
    )["rmse"]  # fmt: skip
    assert (many.value, many.low, many.high) == pytest.approx((alone.value, alone.low, alone.high))
    rows = measure_all(VALUES, np.tile(truth, 100), np.tile(outputs, 100)[:, None], np.tile(outputs, 100),
                       np.arange(1000), 3)["rmse"]  # fmt: skip
    assert rows.high - rows.low < (many.high - many.low) / 3


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    draw, covered = np.random.default_rng(1), 0
    for _ in range(30):
        truth = draw.integers(0, 2, 60).astype(float)
        predicted = np.where(draw.random(60) < 0.8, truth, 1 - truth)
        outputs = np.stack([1 - predicted, predicted], 1)
        found = measure_all(classes(2), truth, outputs, predicted, np.arange(60), 0)["accuracy"]
        covered += found.low <= 0.8 <= found.high
    assert 25 <= covered <= 30


def test_a_threshold_is_chosen_where_it_separates():
    scores = np.array([0.05, 0.1, 0.15, 0.2, 0.3, 0.35])
    outputs = np.stack([1 - scores, scores], 1)
    truth = np.array([0, 0, 0, 0, 1, 1.0])
    threshold = choose_threshold(classes(2), truth, outputs)
    assert threshold == pytest.approx(0.25)
    assert decide(classes(2), outputs, threshold).tolist() == truth.tolist()
    assert decide(classes(2), outputs, None).tolist() == [0] * 6
    assert choose_threshold(classes(3), truth, outputs) is None
