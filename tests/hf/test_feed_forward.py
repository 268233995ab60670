"""Feed-forward parts are found by structure, and chunks of tokens change nothing but memory."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
import transformers as tf
from torch import nn

from longlens.errors import InputError
from longlens.hf import attach
from longlens.hf.feed_forward import feed_forward_modules
from longlens.testing import peak_growths

MORE = {
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**{**tiny.DECODER, "head_dim": 8})),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**{**tiny.DECODER, "num_local_experts": 4})),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**tiny.DECODER)),
}
BUILD = {name: tiny.ALL[name] for name in ("gpt2", "llama", "mistral", "gemma2", "modernbert", "distilbert")} | MORE


@pytest.mark.parametrize("name", list(BUILD))
def test_chunks_change_nothing(name):
    model = BUILD[name]().eval()
    ids = tiny.tokens(2, 23)
    parts = feed_forward_modules(model)
    layers = getattr(model.config, "num_hidden_layers", None) or model.config.n_layers
    assert len(parts) == layers
    longest = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: longest.append(args[0].shape[1]))
        for part in parts.values()
        for module in part.modules()
        if isinstance(module, nn.Linear | tf.pytorch_utils.Conv1D)
    ]
    with torch.no_grad():
        with attach(model):
            expected = tiny.run(model, ids)
        longest.clear()
        with attach(model, mlp_chunk=5):
            got = tiny.run(model, ids)
        # 8 tokens are tried together once
        assert not longest or max(longest) <= 8
        scale = expected.abs().amax()
        assert (got - expected).abs().amax() <= 1e-5 * scale
        longest.clear()
        tiny.run(model, ids)
        assert not longest or max(longest) == 23
    for hook in hooks:
        hook.remove()
    assert all("forward" not in part.__dict__ for part in parts.values())


class Mixing(nn.Module):
    """A part that mixes neighbouring tokens: chunks would change its result."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden):
        return self.second(self.first(hidden) + hidden.cumsum(1))


def test_a_part_that_mixes_tokens_runs_whole():
    model = tiny.llama().eval()
    model.model.layers[0].mlp = Mixing(32)
    ids = tiny.tokens(1, 20)
    with torch.no_grad(), attach(model):
        expected = tiny.run(model, ids)
    with torch.no_grad(), attach(model, mlp_chunk=5):
        assert torch.allclose(tiny.run(model, ids), expected, rtol=0, atol=1e-5 * float(expected.abs().amax()))


def test_gradients_are_those_of_the_whole():
    model = tiny.gpt2().eval()
    ids = tiny.tokens(1, 20)
    grads = []
    for chunk in (None, 4):
        model.zero_grad()
        with attach(model, mlp_chunk=chunk):
            tiny.run(model, ids).square().sum().backward()
        grads.append(model.transformer.h[0].mlp.c_fc.weight.grad.clone())
    assert torch.equal(*grads)


def test_copies_run_whole_and_by_themselves():
    model = tiny.gpt2().eval()
    with attach(model, mlp_chunk=4):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            part = other.transformer.h[0].mlp
            with torch.no_grad():
                for parameter in part.parameters():
                    parameter.zero_()
                assert float(part(torch.randn(1, 9, 32)).abs().amax()) == 0.0
            assert float(model.transformer.h[0].mlp(torch.randn(1, 9, 32)).detach().abs().amax()) > 0.0


def test_nested_attachments_restore_in_order():
    model = tiny.llama().eval()
    part = model.model.layers[0].mlp
    with attach(model, mlp_chunk=8):
        outer = part.__dict__["forward"]
        with attach(model, "window:4", mlp_chunk=3):
            assert part.__dict__["forward"] is not outer
        assert part.__dict__["forward"] is outer
    assert "forward" not in part.__dict__


@pytest.mark.parametrize("chunk", [0, -1, 2.5, True])
def test_a_chunk_is_a_number_of_tokens(chunk):
    with pytest.raises(InputError, match="mlp_chunk"):
        attach(tiny.gpt2(), mlp_chunk=chunk)


@pytest.mark.memory
def test_the_wide_layer_is_not_held_for_all_tokens():
    """A feed-forward part of 64 widths: in chunks, the growth stays below that of one wide tensor."""
    here = str(Path(__file__).parent)
    cases = [{"length": 4096, "chunk": None}, {"length": 4096, "chunk": 256}]
    whole, parts = peak_growths("wide_pass:wide_pass", cases, path=[here], warm_up={"length": 64}, runs=1)
    wide = 4096 * 64 * 32 * 4
    print(f"whole {whole / 2**20:.1f} MiB, in chunks {parts / 2**20:.1f} MiB, a wide tensor {wide / 2**20:.1f} MiB")
    assert whole > wide
    assert parts < wide / 2
