"""What every statistic can do: tables, shapes, and how it shows itself in a notebook."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import longlens
from longlens.errors import InputError
from longlens.lens import Entropy, Pooled, Received, TopKeys, TopQueries, WeightHistogram, predictions
from longlens.lens.collect.maps import Cells
from longlens.lens.results import PooledMap, RowValues
from longlens.lens.scan import scan
from longlens.lens.statistic import DRAWN, Statistic
from longlens.watching import trajectories, watch

TEXTS = ["MKTAYIAKQRQISFVKSHFSRQ", "GAVLI"]
COLLECT = (
    Entropy(), Received(), TopKeys(3), TopQueries(2), Pooled(4), Cells(queries=(0, 5), label="some"), WeightHistogram(),
)  # fmt: skip


@pytest.fixture(scope="module")
def seen():
    model = longlens.load("tiny")
    with torch.no_grad(), watch(model, COLLECT) as seen:
        model(model.pack(TEXTS))
    return seen


@pytest.fixture(scope="module")
def path():
    model = longlens.load("tiny")
    packed = model.pack(TEXTS)
    return trajectories(model, packed, packed.tokens, top=2)


def all_of(seen, path):
    for name in seen.calls[-1][0]:
        yield getattr(seen, name)
        yield getattr(seen, name)[2]
    yield path
    yield path[3]


def test_a_layer_of_a_statistic_is_a_table_too(seen):
    """It was a bare tensor, which has no `to_frame`."""
    frame = seen.entropy[0].to_frame()
    assert list(frame.columns) == ["batch", "head", "query", "entropy"]
    assert len(frame) == seen.entropy[0].values.numel()
    whole = seen.entropy.to_frame()
    assert (whole[whole["layer"] == 0]["entropy"].to_numpy() == frame["entropy"].to_numpy()).all()


def test_every_layer_gives_the_statistic_itself(seen):
    for name in seen.calls[-1][0]:
        layered = getattr(seen, name)
        for layer in layered:
            assert isinstance(layered[layer], Statistic)
            assert layered[layer] is seen.calls[-1][layer][name]


def test_values_are_indexed_and_given_to_numpy_as_their_tensor(seen):
    entropy = seen.entropy[1]
    assert entropy.shape == entropy.values.shape
    assert len(entropy) == 1
    assert torch.equal(entropy[0, 2], entropy.values[0, 2])
    assert np.array_equal(np.asarray(entropy), entropy.values.numpy())
    assert np.asarray(entropy, dtype=np.float64).dtype == np.float64
    assert np.mean(entropy) == pytest.approx(entropy.values.mean().item())


def test_absent_partners_are_in_no_table():
    query, key = torch.randn(2, 1, 2, 12, 4)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[:, :5] = False
    for top in scan(query, key, collect=[TopKeys(3), TopQueries(3)], key_mask=mask, is_causal=True).values():
        table = top.columns()
        assert len(table["weight"]) == top._rows() < top.index.numel()
        assert (table["key"] >= 5).all()
        assert (table["query"] >= table["key"]).all()
        for rows in (1, 7):
            assert all((column[:rows] == top.columns(rows)[name]).all() for name, column in table.items())


@pytest.mark.parametrize("rows", [0, 1, 5, 40, 10**6])
def test_the_first_rows_are_those_of_the_whole_table(seen, path, rows):
    for statistic in all_of(seen, path):
        whole, some = statistic.columns(), statistic.columns(rows)
        assert list(whole) == list(some)
        for name, column in whole.items():
            np.testing.assert_array_equal(some[name], column[:rows])
            assert some[name].dtype == column.dtype


def test_notebooks_show_the_first_rows_their_number_and_a_figure(seen, path):
    pytest.importorskip("matplotlib")
    for statistic in all_of(seen, path):
        page = statistic._repr_html_()
        assert page.startswith(f"<div><p><b>{statistic.name}: ")
        rows = len(next(iter(statistic.columns().values())))
        assert f"<p>8 of {rows:,} rows</p>" in page
        for name in statistic.columns():
            assert f"<th>{name}</th>" in page
    for statistic in (seen.entropy, seen.entropy[0], seen.pooled[0], seen.top_keys[1], path, path[3]):
        assert "data:image/png" in statistic._repr_html_()
    # maps of several layers have no one figure
    assert "<img" not in seen.pooled._repr_html_()
    assert "layers 0-" in seen.entropy._repr_html_()


def test_notebooks_show_tables_without_matplotlib(seen, path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for statistic in all_of(seen, path):
        page = statistic._repr_html_()
        assert "<table>" in page
        assert "<img" not in page


def test_what_is_large_is_shown_without_a_figure():
    large = RowValues("entropy", torch.rand(1, 2, DRAWN))
    assert large.marks > DRAWN
    page = large._repr_html_()
    assert "<img" not in page
    assert f"8 of {2 * DRAWN:,} rows" in page
    # a map's heads are averaged before it is drawn
    edges = torch.arange(65)
    assert PooledMap("pooled", torch.rand(1, 100, 64, 64), edges, edges, "mean").marks == 64 * 64


def test_shapes_are_told_in_words(seen):
    assert repr(seen.entropy[0]) == "RowValues(entropy: values (1, 4, 31) float32)"
    assert seen.top_keys[0].arrays == "index (1, 4, 31, 3) int64, weight (1, 4, 31, 3) float32"
    assert repr(seen.entropy).startswith("Layered(entropy: layers 0-4; each values (1, 4, 31) float32")


def test_what_was_watched_shows_what_there_is(seen):
    page = seen._repr_html_()
    for name in seen.calls[-1][0]:
        assert f"<td>{name}</td>" in page
    assert "values (1, 4, 31) float32" in page
    model = longlens.load("tiny")
    with watch(model, [Entropy()]) as nothing:
        pass
    assert "0 calls" in nothing._repr_html_()


def test_predictions_of_nothing_show_themselves():
    found = predictions(torch.randn(0, 8), torch.nn.Linear(8, 5), torch.zeros(0, dtype=torch.int64))
    assert "predictions" in found._repr_html_()


def test_a_missing_pandas_is_named(seen, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    for statistic in (seen.entropy, seen.entropy[0]):
        with pytest.raises(InputError, match=r"longlens\[notebook\]"):
            statistic.to_frame()
