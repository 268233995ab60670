"""Observers in several threads, through failures, interruptions and recomputed layers, on models of both kinds."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import bert, eager, run, tokens
from torch.nn import functional as F

import longlens
from longlens.hf import attach
from longlens.lens import Entropy
from longlens.ops.observe import ForwardObserver, Observer


class Counter(Observer):
    """Writes down what it is told."""

    def __init__(self):
        self.ended, self.begun = [], 0

    def begin(self):
        self.begun += 1
        return Count(self)


class Count(ForwardObserver):
    def __init__(self, counter):
        self.counter, self.layers, self.thread = counter, [], threading.get_ident()

    def attended(self, call):
        assert self.thread == threading.get_ident()
        self.layers.append((call.layer, tuple(call.query.shape)))
        # the settings are those of `longlens.attention`
        settings = dict(call.settings)
        again = longlens.attention(call.query, call.key, call.value, **settings)
        torch.testing.assert_close(again, call.output)

    def ended(self):
        self.counter.ended.append(self.layers)


def ours():
    model = longlens.load("tiny")
    return model, lambda length: model(model.pack(["A" * (length - 2)])).last, model.config.layers


def theirs():
    model = eager(bert)
    return model, lambda length: run(model, tokens(1, length)), 2


@pytest.mark.parametrize("build", [ours, theirs])
def test_one_watch_and_three_threads(build):
    model, call, layers = build()
    counter = Counter()
    lengths = {0: 11, 1: 17, 2: 23}
    failures = []

    def work(number):
        try:
            with torch.no_grad():
                for _ in range(6):
                    call(lengths[number])
        except BaseException as error:
            failures.append(error)

    with longlens.observe(model, counter), longlens.watch(model, [Entropy()]) as seen:
        threads = [threading.Thread(target=work, args=(number,)) for number in lengths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert counter.begun == len(counter.ended) == len(seen.calls) == 18
    # no pass holds another's layers
    got = sorted(shape[2] for told in counter.ended for _, shape in told)
    assert got == sorted(length for length in lengths.values() for _ in range(6 * layers))
    for told in counter.ended:
        assert [layer for layer, _ in told] == list(range(layers))
        assert len({shape for _, shape in told}) == 1
    for results in seen.calls:
        assert sorted(results) == list(range(layers))
        assert len({result["entropy"].values.shape[2] for result in results.values()}) == 1


def test_an_attached_model_leaves_other_threads_alone():
    """A bystander trains by PyTorch's attention with dropout and narrower values."""
    model = eager(bert)
    failures, done = [], threading.Event()

    def bystander():
        try:
            while not done.is_set():
                leaf = torch.randn(1, 2, 32, 16, requires_grad=True)
                F.scaled_dot_product_attention(leaf, leaf, leaf[..., :8], dropout_p=0.1).sum().backward()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=bystander)
    with attach(model, "exact"):
        thread.start()
        for _ in range(60):
            run(model, tokens(1, 40))
        done.set()
        thread.join()
    assert not failures


class Stop(BaseException):
    """An interruption, as KeyboardInterrupt: hooks are not called after it."""


@pytest.mark.parametrize("error", [RuntimeError, Stop])
@pytest.mark.parametrize("build", [ours, theirs])
def test_a_pass_that_fails_or_is_interrupted_is_dropped(build, error):
    model, call, layers = build()
    counter, armed = Counter(), []
    module = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)][-2]

    def fail(*_):
        if armed:
            raise error

    handle = module.register_forward_pre_hook(fail)
    with torch.no_grad(), longlens.observe(model, counter):
        call(9)
        armed.append(True)
        for _ in range(2):
            with pytest.raises(error):
                call(9)
        armed.clear()
        call(13)
    handle.remove()
    assert counter.begun == 4
    assert [[layer for layer, _ in told] for told in counter.ended] == [list(range(layers))] * 2
    assert {shape[2] for _, shape in counter.ended[1]} == {13}


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_are_told_once(reentrant):
    model = bert(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0).train()
    counter = Counter()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    with longlens.observe(model, counter):
        embedded = model.embeddings(tokens()).detach().requires_grad_()
        model(inputs_embeds=embedded).last_hidden_state.sum().backward()
        model(inputs_embeds=embedded).last_hidden_state.sum().backward()
    assert [[layer for layer, _ in told] for told in counter.ended] == [[0, 1]] * 2


def test_an_observer_of_one_pass_alone():
    model = longlens.load("tiny")
    counter, packed = Counter(), model.pack(["MKTAYIAKQR"])
    with torch.no_grad():
        model(packed)
        model(packed, observers=[counter])
        model(packed)
    assert counter.begun == 1


def test_a_model_of_a_users_own_can_be_watched():
    class Own(torch.nn.Module):
        """A model that tells of its attention."""

        def __init__(self):
            super().__init__()
            self.encoder = longlens.load("tiny")

        def attentions(self):
            return ["only"]

        def observed(self, observer, method=None):
            return self.encoder.observed(observer, method)

        def forward(self, *args):
            return self.encoder(*args)

    model = Own()
    with torch.no_grad(), longlens.watch(model, [Entropy()]) as seen:
        model(model.encoder.pack(["MKT"]))
    assert seen.names == ("only",)
    assert seen.layers == (0,)
