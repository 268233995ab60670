"""Predictions equal the dense log-softmax in float64, however the tokens and the vocabulary are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import longlens
from longlens.errors import InputError
from longlens.lens import Head, Predictions, predictions
from longlens.models.encoder import EncoderConfig
from longlens.models.language_model import MaskedLM
from longlens.models.parts.positions import LearnedPositions
from longlens.testing import peak_growths
from longlens.watching import trajectories

TEXTS = ["MKTAYIAKQRQISFVKSHFSRQ", "GAVLI"]


def dense(logits, targets=None):
    """surprise, entropy and rank of float64 logits, by the definition."""
    log_p = torch.log_softmax(logits.double(), -1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    if targets is None:
        return entropy
    of_target = log_p.gather(1, targets.unsqueeze(1))
    return -of_target.squeeze(1), entropy, 1 + (log_p > of_target).sum(1)


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


def a_head(vocabulary=301, width=24, **more):
    """Logits far from even, so that entropies differ from token to token."""
    return Head(torch.randn(vocabulary, width), torch.randn(vocabulary), **more)


@pytest.mark.parametrize("chunk", [None, 1, 7, 64, 1000])
@pytest.mark.parametrize("block", [None, 1, 50, 301, 999])
def test_statistics_are_those_of_the_dense_log_softmax(chunk, block):
    hidden, head = torch.randn(63, 24), a_head(transform=torch.tanh, softcap=20.0)
    targets = torch.randint(301, (63,))
    found = predictions(hidden, head, targets, top=4, chunk=chunk, block=block)
    logits = torch.tanh(hidden.double()).double() @ head.weight.double().T + head.bias.double()
    logits = 20 * torch.tanh(logits / 20)
    surprise, entropy, rank = dense(logits, targets)
    close(found.surprise, surprise)
    close(found.entropy, entropy)
    # a difference of two, each as exact as that
    torch.testing.assert_close(found.excess.double(), surprise - entropy, rtol=2e-6, atol=8e-6)
    assert torch.equal(found.rank, rank)
    best = torch.log_softmax(logits, -1).topk(4)
    close(found.top_log_probability, best.values)
    assert torch.equal(found.top, best.indices)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0])
def test_even_certain_and_shifted_logits_keep_their_precision(scale, shift):
    logits = torch.randn(50, 4000) * scale + shift
    targets = torch.randint(4000, (50,))
    found = predictions(logits, lambda rows: rows, targets)
    surprise, entropy, _ = dense(logits, targets)
    close(found.surprise, surprise)
    close(found.entropy, entropy)


@pytest.mark.parametrize("block", [None, 8])
def test_sure_predictions_keep_their_relative_precision(block):
    # the other tokens hold e^-4 to e^-16 of the probability
    weight = torch.randn(33, 1) * 0.1
    weight[0] = 1.0
    hidden, bias = torch.linspace(8, 20, 40)[:, None], torch.zeros(33)
    targets = torch.zeros(40, dtype=torch.int64)
    found = predictions(hidden, Head(weight, bias), targets, block=block)
    surprise, entropy, _ = dense(hidden @ weight.T, targets)
    assert surprise.min() < 1e-5
    torch.testing.assert_close(found.surprise.double(), surprise, rtol=5e-6, atol=0)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=5e-6, atol=0)
    torch.testing.assert_close(found.top_log_probability[:, 0].double(), -surprise, rtol=5e-6, atol=0)


def test_the_head_may_be_a_function_a_linear_layer_or_a_head():
    hidden, layer = torch.randn(40, 24), nn.Linear(24, 90)
    targets = torch.randint(90, (40,))
    one, two, three = (
        predictions(hidden, head, targets) for head in (layer, lambda rows: layer(rows), Head(layer.weight, layer.bias))
    )
    for other in (two, three):
        assert torch.equal(one.surprise, other.surprise)
        assert torch.equal(one.top, other.top)
    assert not one.surprise.requires_grad


def test_a_function_may_keep_what_it_returns():
    logits = torch.randn(10, 20)
    before = logits.clone()
    predictions(logits, lambda rows: rows, top=2)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("block", [None, 5])
def test_equal_logits_share_the_better_rank(block):
    weight = torch.randn(6, 8).repeat(3, 1)
    hidden = torch.randn(30, 8)
    targets = torch.arange(30) % 18
    found = predictions(hidden, Head(weight), targets, top=0, block=block)
    logits = hidden.double() @ weight[:6].double().T
    larger = (logits > logits.gather(1, (targets % 6).unsqueeze(1))).sum(1)
    assert torch.equal(found.rank, 1 + 3 * larger)
    assert found.top.shape == (30, 0)


def test_certain_and_impossible_tokens():
    logits = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]])
    found = predictions(logits, lambda rows: rows, torch.tensor([0, 1]), top=0)
    assert found.surprise.tolist() == [0.0, torch.inf]
    assert found.entropy.tolist() == [0.0, 0.0]
    assert found.rank.tolist() == [1, 2]


@pytest.mark.parametrize("block", [None, 4])
def test_tokens_that_are_ruled_out_have_no_share(block):
    bias = torch.zeros(12)
    bias[:5] = -torch.inf
    head = Head(torch.randn(12, 3), bias)
    hidden, targets = torch.randn(9, 3), torch.arange(9) % 7 + 5
    found = predictions(hidden, head, targets, top=12, block=block)
    surprise, entropy, rank = dense((hidden @ head.weight.T + bias)[:, 5:], targets - 5)
    close(found.surprise, surprise)
    close(found.entropy, entropy)
    assert torch.equal(found.rank, rank)
    assert (found.top_log_probability[:, 7:] == -torch.inf).all()
    assert (
        predictions(hidden, head, torch.zeros(9, dtype=torch.int64), block=block).surprise.tolist() == [torch.inf] * 9
    )


@pytest.mark.parametrize("block", [None, 7])
def test_tokens_without_a_target_have_no_surprise(block):
    hidden, head = torch.randn(20, 24), a_head(30)
    targets = torch.randint(30, (20,))
    targets[::3] = -100
    found = predictions(hidden, head, targets, block=block)
    there = targets >= 0
    assert found.surprise[~there].isnan().all()
    assert (found.rank[~there] == 0).all()
    surprise, _, rank = dense(head(hidden)[there], targets[there])
    close(found.surprise[there], surprise)
    assert torch.equal(found.rank[there], rank)
    close(found.entropy, dense(head(hidden)))


def test_dtypes():
    hidden, head = torch.randn(20, 24), a_head(50)
    double = Head(head.weight.double(), head.bias.double())
    assert predictions(hidden.double(), double).entropy.dtype == torch.float64
    half = Head(head.weight.bfloat16(), head.bias.bfloat16())
    found = predictions(hidden.bfloat16(), half, torch.zeros(20, dtype=torch.int64))
    assert found.surprise.dtype == torch.float32
    close(found.surprise, dense(half(hidden.bfloat16()), torch.zeros(20, dtype=torch.int64))[0])


def test_no_tokens():
    found = predictions(torch.zeros(0, 24), a_head(10), torch.zeros(0, dtype=torch.int64))
    assert found.surprise.shape == (0,)
    assert found.top.shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden": torch.zeros(2, 5, 24)}, r"got \(2, 5, 24\); lay the rows"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets \(5,\) of int64"),
        ({"targets": torch.zeros(5)}, "got torch.float32"),
        ({"targets": torch.full((5,), 10)}, r"targets in 0..9, or -100 where there is none, got 10..10"),
        ({"targets": torch.full((5,), -1)}, "got -1..-1"),
        ({"top": -1}, "top of at least 0"),
        ({"chunk": 0}, "chunk and block of at least 1"),
        ({"head": lambda rows: rows, "block": 3}, "expected a Head"),
        ({"head": lambda rows: rows[0]}, r"got \(24,\) for one row"),
        ({"head": Head(torch.zeros(0, 24))}, "at least one token"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    with pytest.raises(InputError, match=said):
        predictions(**{"hidden": torch.zeros(5, 24), "head": a_head(10), **change})


def test_table_file_and_figure(tmp_path):
    targets = torch.tensor([1, -100, 3])
    found = predictions(torch.randn(3, 24), a_head(10), targets, top=2, places=torch.tensor([[0, 5], [0, 6], [1, 0]]))
    table = found.columns()
    assert list(table) == [
        "batch", "token", "target", "surprise", "rank", "entropy", "top_1", "log_probability_1", "top_2",
        "log_probability_2",
    ]  # fmt: skip
    assert table["token"].tolist() == [5, 6, 0]
    assert table["batch"].tolist() == [0, 0, 1]
    with np.load(found.save(tmp_path / "found.npz")) as saved:
        np.testing.assert_array_equal(saved["rank"], found.rank.numpy())
    ax = found.plot()
    surprise = ax.lines[1].get_ydata()
    assert len(surprise) == 2
    assert surprise[0] == table["surprise"][0]
    assert list(predictions(torch.randn(3, 24), a_head(10), top=0).columns()) == ["batch", "token", "entropy"]


@pytest.mark.memory
def test_no_matrix_of_tokens_by_vocabulary_is_held():
    here = str(Path(__file__).parent)
    cases = [
        {"length": 1000, "vocabulary": 60_000},
        {"length": 2000, "vocabulary": 60_000},
        {"length": 100, "vocabulary": 400_000},
        {"length": 1000, "vocabulary": 60_000, "block": 6000},
    ]
    one, two, wide, blocks = peak_growths("vocabulary_pass:predict", cases, path=[here], warm_up={"length": 8}, runs=1)
    print(*(f"{growth / 2**20:.1f} MiB" for growth in (one, two, wide, blocks)))
    for growth in (one, two, wide, blocks):
        # up to four tensors of 2^23 logits; (T, V) would be 229, 458, 153 and 229 MiB, and its softmax as much again
        assert growth < 132 * 2**20
    assert two < 1.1 * one


def layers_of(model, packed):
    """Normed streams, by the model's own `keep`: 0 the embedding, L the last layer."""
    depth = model.config.layers
    with torch.no_grad():
        kept = model(packed, keep=range(depth + 1)).layers
        return {n: model.encoder.norm(x) if model.config.pre_norm and n < depth else x for n, x in kept.items()}


def post_norm():
    """A BERT of ours with random weights."""
    alphabet = longlens.load("tiny").alphabet
    shape = {"layers": 3, "width": 32, "heads": 4, "feed_forward": 64}
    places = LearnedPositions(64)
    config = EncoderConfig(len(alphabet.tokens), **shape, pre_norm=False, positions=places, token_dropout=False)
    return MaskedLM(config, alphabet)


@pytest.mark.parametrize("build", [lambda: longlens.load("tiny"), post_norm])
def test_trajectories_of_our_models(build):
    model = build()
    packed = model.pack(TEXTS)
    path = trajectories(model, packed, packed.tokens, top=3, chunk=10)
    streams = layers_of(model, packed)
    assert list(path) == sorted(streams)
    for layer, hidden in streams.items():
        with torch.no_grad():
            surprise, entropy, _ = dense(model.logits(hidden), packed.tokens)
        # chunks and the whole are rounded apart
        torch.testing.assert_close(path[layer].surprise.double(), surprise, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(path[layer].entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    places = path[0].places
    assert places[:, 0].tolist() == [0] * 24 + [1] * 7
    assert places[:, 1].tolist() == [*range(24), *range(7)]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_the_last_layer_is_the_models_own_prediction():
    model = longlens.load("tiny")
    packed = model.pack(TEXTS)
    last = trajectories(model, packed, packed.tokens, layers=[-1])
    with torch.no_grad():
        own = predictions(model(packed).last, model.logits, packed.tokens)
    assert list(last) == [model.config.layers]
    torch.testing.assert_close(last[model.config.layers].surprise, own.surprise, rtol=1e-5, atol=1e-6)
    assert torch.equal(last[model.config.layers].top, own.top)


def test_trajectories_as_table_and_figure():
    model = longlens.load("tiny")
    packed = model.pack(TEXTS)
    path = trajectories(model, packed, top=1, layers=[0, 2])
    assert isinstance(path.results[2], Predictions)
    table = path.columns()
    assert list(table) == ["layer", "batch", "token", "entropy", "top_1", "log_probability_1"]
    assert table["layer"].tolist() == [0] * 31 + [2] * 31
    ax = path.plot()
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array()[1], path[2].entropy[:24].numpy())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2"]


def test_trajectories_that_cannot_be():
    model = longlens.load("tiny")
    packed = model.pack(TEXTS)
    with pytest.raises(InputError, match=r"targets \(31,\), got \(30,\)"):
        trajectories(model, packed, packed.tokens[1:])
    with pytest.raises(InputError, match=r"layers of 0\.\.\d+ .* got 99"):
        trajectories(model, packed, layers=[99])
    with pytest.raises(InputError, match="got Linear; for others call"):
        trajectories(nn.Linear(2, 2), packed)


@pytest.mark.parametrize("block", [None, 7])
def test_variance_and_the_probability_of_a_group_of_tokens(block):
    hidden, weight = torch.randn(9, 8, dtype=torch.float64), 2 * torch.randn(30, 8, dtype=torch.float64)
    group = torch.rand(30) < 0.3
    targets = torch.randint(0, 30, (9,))
    found = predictions(hidden, Head(weight), targets, variance=True, group=group, block=block, chunk=4)
    log_p = (hidden @ weight.T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * log_p.square()).sum(-1) - entropy.square()
    assert torch.allclose(found.variance, variance)
    assert torch.allclose(found.group, log_p[:, group].logsumexp(-1))
    surprise = -log_p.gather(1, targets[:, None])[:, 0]
    assert torch.allclose(found.standardised, (surprise - entropy) / variance.sqrt())
    assert {"variance", "group"} <= found.columns().keys()
    # averaged over what the model expects: mean 0 and variance 1
    every = torch.stack([
        predictions(hidden, Head(weight), torch.full((9,), v), variance=True).standardised for v in range(30)
    ], 1)  # fmt: skip
    assert torch.allclose((log_p.exp() * every).sum(1), torch.zeros(9, dtype=torch.float64), atol=1e-9)
    assert torch.allclose((log_p.exp() * every.square()).sum(1), torch.ones(9, dtype=torch.float64))


def test_a_uniform_prediction_has_no_standardised_surprise():
    found = predictions(torch.zeros(2, 3), Head(torch.randn(5, 3)), torch.tensor([1, 2]), variance=True)
    assert found.variance.tolist() == [0.0, 0.0]
    assert found.standardised.isnan().all()
    assert predictions(torch.zeros(2, 3), Head(torch.randn(5, 3)), torch.tensor([1, 2])).standardised is None


def test_a_group_has_a_flag_for_each_token():
    with pytest.raises(InputError, match="expected group"):
        predictions(torch.zeros(2, 3), Head(torch.randn(5, 3)), group=torch.ones(4, dtype=torch.bool))
