"""Copies of an attached model are not attached and run; what is dropped or switched leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from test_attach import snapshot
from tiny_models import bert, eager, gemma2, run, t5, tokens
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

import longlens
from longlens.errors import InputError
from longlens.hf import attach
from longlens.lens import Entropy


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "configuration": lambda model: built_again(copy.deepcopy(model.config), model),
    "pickled configuration": lambda model: built_again(pickle.loads(pickle.dumps(model.config)), model),
}


def built_again(config, model):
    made = type(model)(config)
    made.load_state_dict(model.state_dict())
    return made.eval()


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("build", [bert, gemma2, t5])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_runs_as_the_model_did_before(way, build, watched):
    model, ids = eager(build), tokens()
    with torch.no_grad():
        plain = run(model, ids)
        with attach(model, "window:2"), attach(model, "window:1"):
            if watched:
                with longlens.watch(model, [Entropy()]) as seen:
                    other = COPIES[way](model)
                    run(other, ids)
                assert not seen.calls
            else:
                other = COPIES[way](model)
            during = run(other, ids)
            assert (run(model, ids) - plain).abs().max() > 1e-3
        after = run(other, ids)
    assert torch.equal(during, plain)
    assert torch.equal(after, plain)
    assert type(other.config._attn_implementation) is str
    # and it can be asked for its weights, attached and watched itself
    if build is bert:
        assert len(other(ids, output_attentions=True).attentions) == 2
    with torch.no_grad(), longlens.watch(other, [Entropy()]) as seen:
        run(other, ids)
    assert len(seen.calls) == 1


def test_a_copy_of_an_observed_model_of_ours_is_not_observed():
    model = longlens.load("tiny")
    with torch.no_grad(), longlens.watch(model, [Entropy()], method="window:2") as seen:
        other = copy.deepcopy(model)
        loaded = saved_and_loaded(model)
        packed = model.pack(["MKTAYIAKQR"])
        assert torch.equal(other(packed).last, loaded(packed).last)
        assert not seen.calls
        near = model(packed).last
    assert len(seen.calls) == 1
    assert torch.equal(other(packed).last, model(packed).last)
    assert (other(packed).last - near).abs().max() > 1e-3


@pytest.mark.parametrize("build", [bert, gemma2, t5])
def test_what_set_attn_implementation_chose_stays_and_detaching_leaves_nothing(build):
    model, ids = build().eval(), tokens()
    model.set_attn_implementation("sdpa" if build is not gemma2 else "eager")
    before = snapshot(model)
    with torch.no_grad():
        plain = run(model, ids)
        with attach(model, "window:1"):
            model.set_attn_implementation("eager")
            torch.testing.assert_close(run(model, ids), plain, rtol=1e-5, atol=2e-5)
        assert model.config._attn_implementation == "eager"
        run(model, ids)
    assert snapshot(model)[1:3] == before[1:3]
    # attachments inside one another, and the choice made in the inner one
    outer = attach(model)
    inner = attach(model, "window:2")
    model.set_attn_implementation("eager")
    outer.detach()
    inner.detach()
    assert snapshot(model)[1:3] == before[1:3]
    assert model.config._attn_implementation == "eager"


def test_a_model_that_was_switched_away_is_not_watched_in_silence():
    model, ids = eager(bert), tokens()
    before = snapshot(model)
    with longlens.watch(model, [Entropy()]):
        model.set_attn_implementation("eager")
        with pytest.raises(InputError, match="set_attn_implementation"):
            run(model, ids)
    assert snapshot(model) == before


@pytest.mark.parametrize("held", ["nothing", "configuration"])
def test_attachments_that_are_dropped_do_not_stay_registered(held):
    names = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    model = eager(bert)
    config, gone = model.config, weakref.ref(model)
    attach(model, "window:2")
    with torch.no_grad():
        assert (run(model, tokens()) - run(copy.deepcopy(model), tokens())).abs().max() > 1e-3
    if held == "nothing":
        del config
    del model
    gc.collect()
    assert gone() is None
    assert (set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)) == names
    if held == "configuration":
        assert config._attn_implementation == "eager"


# ---- a wrapper as peft makes it: PeftModel(base_model=LoraModel(model=...)), with adapters inside the linear layers


class Adapter(nn.Module):
    """peft.tuners.lora.Linear: a linear layer and a product of two thin ones beside it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Tuner(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **given):
        return self.model(*args, **given)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class PeftModel(nn.Module):
    def __init__(self, model, name):
        super().__init__()
        for parent in list(model.modules()):
            if isinstance(getattr(parent, name, None), nn.Linear):
                setattr(parent, name, Adapter(getattr(parent, name)))
        self.base_model = Tuner(model)

    def forward(self, *args, **given):
        return self.base_model(*args, **given)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def test_a_wrapped_model_is_attached_watched_and_recorded():
    ids = tokens()
    inner = eager(bert)
    model = PeftModel(inner, "query").eval()
    before = snapshot(inner)
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        with longlens.watch(inner, [Entropy()]) as expected:
            inner(ids)
        with longlens.watch(model, [Entropy()]) as seen:
            torch.testing.assert_close(model(ids).last_hidden_state, plain, rtol=1e-5, atol=2e-5)
        for layer in (0, 1):
            torch.testing.assert_close(seen.entropy[layer].values, expected.entropy[layer].values)
        assert seen.names[0] == "base_model.model.encoder.layer.0.attention.self"
        with attach(model, "window:1"):
            near = model(ids).last_hidden_state
        assert (near - plain).abs().max() > 1e-3
        with attach(inner, "window:1"):
            assert torch.equal(model(ids).last_hidden_state, near)
    assert snapshot(inner) == before


def test_an_adapter_on_the_projection_is_not_left_out_of_the_norms():
    from longlens.lens import NormWeighted, Received

    ids = tokens()
    model = PeftModel(eager(bert), "dense").eval()
    with (
        torch.no_grad(), longlens.watch(model, [NormWeighted(Received())]),
        pytest.raises(InputError, match="linear layer that follows"),
    ):  # fmt: skip
        model(ids)


def test_trajectories_of_a_wrapped_model():
    from tiny_models import llama

    ids = tokens()
    inner = eager(llama)
    model = PeftModel(inner, "q_proj").eval()
    expected = longlens.trajectories(inner, {"input_ids": ids}, top=1)
    found = longlens.trajectories(model, {"input_ids": ids}, top=1)
    for layer in expected:
        assert torch.equal(found[layer].entropy, expected[layer].entropy)
