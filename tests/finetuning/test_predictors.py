"""Probe, head and low-rank adaptation: closed forms, beginnings, and weights that merge."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

import longlens
from esm_peer import esm, protein, save
from longlens.errors import InputError
from longlens.finetuning.head import Head, head_outputs, readable
from longlens.finetuning.lora import Adapters
from longlens.finetuning.probe import fit_probe
from longlens.finetuning.rows import Rows, Vectors, gather
from longlens.finetuning.targets import Targets, parse_task
from longlens.finetuning.trainer import Stage, TuneSettings
from longlens.jobs.inference import residue_vectors

VALUES = Targets(parse_task("sequence_to_value"), [], ())
TWO = Targets(parse_task("sequence_to_class"), [], ("a", "b"))


@pytest.fixture
def model(tmp_path):
    return longlens.load(save(esm(2, 32, 4), tmp_path))


def rows(targets, count, noise, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, 6)) * [1, 2, 3, 4, 5, 0] + 10
    truth = x @ np.array([1.0, -1, 0.5, 0, 0, 0]) + noise * draw.normal(size=count)
    if targets.task.classes:
        truth = (truth > np.median(truth)).astype(float)
    return Rows(x, truth, np.ones(count), np.arange(count))


def test_the_probe_of_values_is_least_squares_where_there_is_no_noise():
    train, validation = rows(VALUES, 80, 0.0), rows(VALUES, 40, 0.0, 1)
    probe = fit_probe(VALUES, train, validation)
    assert probe.strength == 1e-4
    expected = LinearRegression().fit(train.inputs, train.truth).predict(validation.inputs)
    np.testing.assert_allclose(probe(validation.inputs)[:, 0] * probe.spread + probe.centre, expected, atol=2e-3)


def test_more_noise_takes_a_stronger_penalty():
    assert fit_probe(VALUES, rows(VALUES, 12, 30.0), rows(VALUES, 200, 30.0, 1)).strength >= 1.0


@pytest.mark.parametrize("targets", [VALUES, TWO])
def test_a_head_begins_at_its_probe(targets):
    train = rows(targets, 80, 1.0)
    probe = fit_probe(targets, train, rows(targets, 40, 1.0, 1))
    head = Head(6, targets.outputs, 8)
    head.begin(probe, torch.Generator().manual_seed(0))
    head.eval()
    x = torch.tensor(train.inputs, dtype=torch.float32)
    np.testing.assert_allclose(head(x).detach(), probe(train.inputs), atol=1e-3)
    # the pooling begins as the mean over residues
    parts = [x[:30], x[30:]]
    torch.testing.assert_close(head.pool(parts), torch.stack([part.mean(0) for part in parts]))
    found = np.concatenate(head_outputs(head.requires_grad_(False), parts, targets))
    np.testing.assert_allclose(found, readable(head, torch.stack([p.mean(0) for p in parts]), targets), atol=1e-5)


def test_a_protein_counts_once_whatever_its_length():
    task = Targets(parse_task("residue_to_class"), [], ("a", "b"))
    head, weights = Head(4, 2, 3), torch.tensor([1.0, 3.0])
    long, short = torch.randn(50, 2), torch.randn(2, 2)
    truth = [torch.zeros(50, dtype=torch.float64), torch.tensor([1.0, torch.nan], dtype=torch.float64)]
    losses = head.losses([long, short], truth, task, weights)
    expected = [-torch.log_softmax(long, 1)[:, 0].mean(), -3 * torch.log_softmax(short, 1)[0, 1]]
    torch.testing.assert_close(losses, torch.stack(expected))
    vectors = Vectors(np.zeros((52, 4)), np.array([0, 50, 52]))
    targets = Targets(task.task, [value.numpy() for value in truth], ("a", "b"))
    gathered = gather(vectors, targets, [0, 1], np.ones(2), None)
    assert len(gathered.truth) == 51
    assert gathered.weights[:50].sum() == pytest.approx(gathered.weights[50])


def test_adapters_begin_as_nothing_and_merge_into_the_weights(model):
    texts = [protein(30, 1), protein(17, 2)]
    before = residue_vectors(model, texts)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = Adapters.make(model, rank=4, alpha=8, seed=0)
    with adapters.trained():
        for one, two in zip(residue_vectors(model, texts), before, strict=True):
            torch.testing.assert_close(one, two)
    with torch.no_grad():
        for parameter in adapters.parameters().values():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    with adapters.trained():
        adapted = residue_vectors(model, texts)
    with adapters.merged(), torch.no_grad():
        merged = residue_vectors(model, texts)
        inside = model.state_dict()
    assert (adapted[0] - before[0]).abs().max() > 0.01
    for one, two in zip(adapted, merged, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    # W + (alpha / r) B A, for queries, keys and values one under the other
    layer = model.encoder.layers[1]
    adapter = adapters.layers[2][2]
    blocks = [up @ down for up, down in zip(adapter.up, adapter.down.chunk(3), strict=True)]
    torch.testing.assert_close(inside["encoder.layers.1.qkv.weight"], layer.qkv.weight + 2.0 * torch.cat(blocks))
    # the model is as it was
    assert list(model.state_dict()) == list(weights) == list(inside)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert not model.encoder.recompute


def test_gradients_of_adapters_are_those_of_the_merged_weights(model):
    """By the chain rule, from the dense gradient of W: dB = (alpha / r) dW A^T."""
    texts = [protein(20, 3)]
    adapters = Adapters.make(model, rank=4, alpha=8, seed=0)
    with adapters.trained():
        residue_vectors(model, texts)[0].square().sum().backward()
    layer = model.encoder.layers[0]
    layer.out.weight.requires_grad_(True)
    residue_vectors(model, texts)[0].square().sum().backward()
    adapter = adapters.layers[1][2]
    torch.testing.assert_close(adapter.up.grad[0], 2.0 * layer.out.weight.grad @ adapter.down.T, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.encoder.layers[0].qkv.parameters())


def stage(count=40, **more):
    """A line to learn: y = 2 x."""
    weight = torch.nn.Parameter(torch.zeros(1))
    x = torch.linspace(-1, 1, count)
    settings = TuneSettings(**{"steps": 60, "every": 5, "tokens": 60, "rate": 0.1, "patience": 3, **more})
    return Stage(
        {"weight": weight}, lambda proteins: (weight * x[list(proteins)] - 2 * x[list(proteins)]) ** 2,
        range(count - 10), range(count - 10, count), [10] * count, settings, {"weight": 0.1}, torch.nn.Identity(),
        nullcontext,
    )  # fmt: skip


def test_a_stage_learns_keeps_its_best_step_and_stops():
    learner = stage()
    state = learner.first_state()
    losses = [state["best_loss"]]
    while not learner.ended(state):
        state = learner.train_round(state)
        losses.append(state["log"][-1][2])
    assert state["best_loss"] == min(losses) < 0.01 * losses[0]
    assert state["best_step"] == 5 * losses.index(min(losses))
    assert learner.train_round(state) is state
    learner.restore(state["best"])
    assert learner.validation_loss() == pytest.approx(state["best_loss"])
    # patience: a rate that only does harm
    harmful = stage(steps=1000)
    harmful.rate = {"weight": 100.0}
    state = harmful.first_state()
    while not harmful.ended(state):
        state = harmful.train_round(state)
    assert (state["step"], state["best_step"]) == (15, 0)


def test_steps_hold_whole_proteins_within_the_budget_and_every_protein_comes_by():
    learner = stage()
    learner.lengths = [number % 17 + 1 for number in range(39)] + [100]
    learner.training = range(40)
    for epoch in range(3):
        batches = learner.batches(epoch)
        assert sorted(number for batch in batches for number in batch) == list(range(40))
        for batch in batches:
            assert len(batch) == 1 or sum(learner.lengths[number] + 2 for number in batch) <= 60
    assert learner.batches(0) == learner.batches(0) != learner.batches(1)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("rank", 0), ("rate", 0.0), ("tokens", -1), ("seed", -1)])
def test_settings_that_do_not_fit(name, value):
    with pytest.raises(InputError, match=f"expected .*{name}|expected a {name}"):
        TuneSettings(**{name: value})
