"""Watching our own models: they give what they give alone, and what is seen is what their attention did."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import longlens
from longlens.errors import InputError, LensError
from longlens.lens.collect.columns import Received
from longlens.lens.collect.maps import Cells
from longlens.lens.collect.rows import Entropy, TopKeys
from longlens.lens.scan import scan
from longlens.lens.watch import STANDARD
from longlens.models.encoder import attend_with
from longlens.watching import watch

TEXTS = ["MKTAYIAKQRQISFVKSHFSRQ", "GAVLI", "MKWVTFISLLFLFSSAYS"]


@pytest.fixture(scope="module")
def model():
    return longlens.load("tiny")


def weights_of(model, packed):
    """(H, T, T) of each layer in float64, 0 between sequences, from the queries and keys that attention is handed."""
    found = []
    lengths = packed.cu_seqlens.diff().long()
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)

    def attend(query, key, value, *, layer, scale, cu_seqlens):
        scores = query[0].double() @ key[0].double().transpose(1, 2) * scale
        weights = torch.softmax(scores.masked_fill(ids.unsqueeze(0) != ids.unsqueeze(1), -torch.inf), -1)
        found.append(weights)
        return (weights @ value[0].double()).to(value.dtype).unsqueeze(0)

    with torch.no_grad():
        last = model(packed, attend=attend).last
    return found, last


def hooks_of(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("whole", [True, False])
def test_statistics_are_those_of_the_dense_weights(model, whole):
    packed = model.pack(TEXTS)
    weights, _ = weights_of(model, packed)
    watched = model if whole else model.encoder
    with torch.no_grad():
        plain = model(packed).last
        with watch(watched, [Entropy(), Received(), TopKeys(4), Cells(queries=(0, 30), label="some")]) as seen:
            found = watched(packed).last
    assert torch.equal(found, plain)
    assert seen.layers == tuple(range(model.config.layers))
    for layer, p in enumerate(weights):
        entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
        torch.testing.assert_close(seen.entropy[layer][0].double(), entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.received[layer][0].double(), p.sum(-2), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.top_keys[layer].weight[0].double(), p.topk(4).values, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen.some[layer][0].double(), p[:, [0, 30]], rtol=1e-4, atol=1e-6)
    assert hooks_of(model) == [0] * len(hooks_of(model))


def test_the_standard_set_and_several_calls(model):
    one, two = model.pack(TEXTS[:1]), model.pack(TEXTS[1:])
    with torch.no_grad(), watch(model) as seen:
        model(one)
        model(two)
    assert len(seen.calls) == 2
    assert set(seen.calls[0][0]) == {collector.name for collector in STANDARD}
    # attributes show the last call
    assert seen.entropy[0].shape[2] == len(two.tokens)
    assert seen.calls[0][0]["entropy"].values.shape[2] == len(one.tokens)


def test_some_layers_and_heads(model):
    packed = model.pack(TEXTS)
    with torch.no_grad():
        with watch(model, [Entropy()]) as every:
            model(packed)
        with watch(model, [Entropy()], layers=[1, -1], heads=[2]) as seen:
            model(packed)
    last = model.config.layers - 1
    assert seen.layers == (1, last)
    for layer in (1, last):
        torch.testing.assert_close(seen.entropy[layer].values, every.entropy[layer][:, [2]])
    with pytest.raises(InputError, match="a layer that was seen"):
        seen.entropy[0]
    with pytest.raises(InputError, match="expected layers of"):
        watch(model, layers=[model.config.layers]).__enter__()
    with torch.no_grad(), watch(model, heads=[99]), pytest.raises(InputError, match="expected heads of"):
        model(packed)


def test_another_method_runs_and_is_seen(model):
    packed = model.pack(TEXTS[:1])
    with torch.no_grad():
        near = model(packed, attend=attend_with("window:2")).last
        with watch(model, [Cells(queries=(10,), label="row")], method="window:2") as seen:
            assert torch.equal(model(packed).last, near)
            assert torch.equal(model(packed, attend=attend_with("window:2")).last, near)
    assert torch.equal(seen.row[0][0, 0, 0].nonzero().flatten(), torch.arange(8, 13))
    with torch.no_grad(), watch(model, [Cells(queries=(10,), label="row")]) as seen:
        model(packed, attend=attend_with("window:2"))
    assert torch.equal(seen.row[0][0, 0, 0].nonzero().flatten(), torch.arange(8, 13))
    # attention of which nothing is known, and which is not exact
    unknown = lambda *args, **given: attend_with("window:2")(*args, **given)  # noqa: E731
    with torch.no_grad(), watch(model, [Entropy()]), pytest.raises(LensError, match="layer 0"):
        model(packed, attend=unknown)


def test_training_with_recomputed_layers(monkeypatch):
    scans = []

    def counted(*args, **given):
        scans.append(given["where"])
        return scan(*args, **given)

    monkeypatch.setattr("longlens.lens.calls.scan", counted)
    model = longlens.load("tiny").requires_grad_(True)
    model.encoder.recompute = True
    packed = model.pack(TEXTS)
    with watch(model, [Entropy()]) as seen:
        model(packed).last.sum().backward()
    assert len(seen.calls) == 1
    # the second run of each layer shows nothing new
    assert len(scans) == len(set(scans)) == model.config.layers
    assert not seen.entropy[0].values.requires_grad
    assert model.encoder.layers[0].qkv.weight.grad.abs().max() > 0


def test_the_model_is_what_it_was_after_an_exception(model):
    packed = model.pack(TEXTS)
    with pytest.raises(RuntimeError, match="in the middle"), watch(model):
        raise RuntimeError("in the middle")
    assert hooks_of(model) == [0] * len(hooks_of(model))
    with torch.no_grad(), watch(model, [Entropy()]) as seen:
        with pytest.raises(InputError):
            model(packed._replace(tokens=packed.tokens.float()))
        assert not seen.calls
        model(packed)
    assert len(seen.calls) == 1


def test_what_was_not_collected_or_seen_is_an_error(model):
    with watch(model, [Entropy()]) as seen:
        with pytest.raises(AttributeError, match="nothing called 'received' was collected; there is entropy"):
            _ = seen.received
        with pytest.raises(InputError, match="nothing was seen yet"):
            _ = seen.entropy
    with pytest.raises(InputError, match="at least one collector"):
        watch(model, [])
    with pytest.raises(InputError, match="of different names"):
        watch(model, [Entropy(), Entropy()])


def test_tables_and_files(model, tmp_path):
    packed = model.pack(TEXTS)
    with torch.no_grad(), watch(model, [Entropy(), TopKeys(2)], layers=[0, 3]) as seen:
        model(packed)
    table = seen.top_keys.columns()
    assert list(table)[:2] == ["layer", "batch"]
    assert sorted(set(table["layer"])) == [0, 3]
    read = np.load(seen.entropy.save(tmp_path / "entropy.npz"))
    assert np.allclose(read["entropy"][read["layer"] == 3], seen.entropy[3].values.flatten())
    assert list(seen.entropy) == [0, 3]
    assert len(seen.entropy) == 2
    assert seen.entropy.results[3] is seen.entropy[3]
    pyarrow = pytest.importorskip("pyarrow.parquet")
    read = pyarrow.read_table(seen.entropy.save(tmp_path / "entropy.parquet"))
    assert read.column_names == ["layer", "batch", "head", "query", "entropy"]


def test_figures(model):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    with torch.no_grad(), watch(model, [Entropy()], layers=[0, 1, 3]) as seen:
        model(model.pack(TEXTS))
    panels = seen.entropy.plot()
    assert [panel.get_title() for panel in panels.flat] == ["entropy, layer 0", "entropy, layer 1", "entropy, layer 3"]
    assert len(panels.flat[0].lines) == model.config.heads
    with pytest.raises(InputError, match="expected one layer to draw"):
        seen.entropy.plot(panels.flat[0])
    plt.close("all")
