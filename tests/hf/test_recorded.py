"""Rollout, gradient x attention and norm-weighting of transformers models equal whole matrices of eager attention."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tiny_models import bert, eager, gpt2, llama, padding, tokens

import longlens
from longlens.errors import InputError
from longlens.lens import (
    JointNorm,
    NormWeighted,
    Received,
    TopKeys,
    relevance,
    relevance_map,
    rollout,
    rollout_map,
)


def vit():
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return tf.ViTModel(tf.ViTConfig(**shape, image_size=20, patch_size=5, initializer_range=0.3))


# model, what it is called with, and the token of the last layer whose first number is explained
CASES = {
    "bert": (bert, lambda: {"input_ids": tokens(), "attention_mask": padding("right")}),
    "bert, left": (bert, lambda: {"input_ids": tokens(), "attention_mask": padding("left")}),
    "gpt2": (gpt2, lambda: {"input_ids": tokens()}),
    "llama": (llama, lambda: {"input_ids": tokens(), "attention_mask": padding("left"), "use_cache": False}),
    "vit": (vit, lambda: {"pixel_values": torch.randn(2, 3, 20, 20)}),
}
TOKEN = 9


def explained(output):
    """A number for each batch row."""
    values = output.logits if "logits" in output else output.last_hidden_state
    return values[:, TOKEN, 3].sum()


def dense(model, inputs, *, gradient):
    """(B, H, N, N) weights of each layer of eager attention, and dY/dA of them."""
    output = model(**inputs, output_attentions=True)
    weights = output.attentions
    if not gradient:
        return [p.detach().double() for p in weights], None
    slopes = torch.autograd.grad(explained(output), weights)
    return [p.detach().double() for p in weights], [slope.double() for slope in slopes]


def dense_rollout(weights, residual=0.5):
    total = torch.eye(weights[0].shape[-1], dtype=torch.float64)
    for p in weights:
        total = ((1 - residual) * p.mean(1) + residual * torch.eye(p.shape[-1], dtype=torch.float64)) @ total
    return total


def dense_relevance(weights, slopes):
    total = torch.eye(weights[0].shape[-1], dtype=torch.float64).expand(len(weights[0]), -1, -1)
    for p, slope in zip(weights, slopes, strict=True):
        total = total + (slope * p).clamp(min=0).mean(1) @ total
    return total


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_rollout(name):
    build, make = CASES[name]
    model, inputs = eager(build), make()
    weights, _ = dense(model, inputs, gradient=False)
    expected = dense_rollout(weights)
    with torch.no_grad(), longlens.record(model) as calls:
        model(**inputs)
    assert len(calls) == 2
    # rows that are padding attend to whatever transformers lets them
    kept = inputs.get("attention_mask", torch.ones(expected.shape[:2])).bool()
    for token in (TOKEN, 15):
        close(rollout(calls, queries=[token]).values[:, 0, 0], expected[:, token])
    if kept.all():
        close(rollout(calls, keys=[2, 7]).values[:, 0], expected[:, :, [2, 7]])
        close(rollout_map(calls, size=expected.shape[-1]).values[:, 0], expected)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_relevance(name, trained):
    build, make = CASES[name]
    model, inputs = eager(build), make()
    expected = dense_relevance(*dense(model, inputs, gradient=True))
    model.requires_grad_(trained)
    with longlens.record(model) as calls:
        explained(model(**inputs)).backward()
    assert calls[0].output_gradient is not None
    off = expected - torch.eye(expected.shape[-1], dtype=torch.float64)
    assert off[:, TOKEN].abs().max() > 1e-2
    close(relevance(calls, queries=[TOKEN]).values[:, 0, 0], expected[:, TOKEN])
    if "attention_mask" not in inputs:
        close(relevance_map(calls, size=expected.shape[-1]).values[:, 0], expected)
    # one row of the batch and another do not mix, and another token's is other
    other = relevance(calls, queries=[TOKEN - 1]).values[:, 0, 0]
    assert (other - expected[:, TOKEN]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_weights_times_the_norms_of_what_they_move(name):
    """Kobayashi et al.: |p_ij W_h v_j| by head, and of the sum over heads, with the model's own modules."""
    build, make = CASES[name]
    model, inputs = eager(build), make()
    inputs.pop("attention_mask", None)
    weights, _ = dense(model, inputs, gradient=False)
    values, projections = pieces(name, model, inputs)
    collect = [NormWeighted(TopKeys(3)), NormWeighted(Received()), JointNorm(Received())]
    with torch.no_grad(), longlens.watch(model, collect) as seen:
        model(**inputs)
    with torch.no_grad(), longlens.watch(model, collect[:2], heads=[2, 0]) as some:
        model(**inputs)
    for layer, (p, value, projection) in enumerate(zip(weights, values, projections, strict=True)):
        moved = torch.einsum("bhjd,xhd->bhjx", value, projection.unflatten(1, (4, -1)))
        by_head = p * moved.norm(dim=-1).unsqueeze(2)
        close(seen.received_norm[layer][:], by_head.sum(2))
        close(seen.top_keys_norm[layer].weight, by_head.topk(3).values)
        close(some.received_norm[layer][:], by_head[:, [2, 0]].sum(2))
        together = torch.einsum("bhij,bhjx->bijx", p, moved).norm(dim=-1)
        close(seen.received_joint_norm[layer][:, 0], together.sum(1))


def pieces(name, model, inputs):
    """Values (B, H, N, Dv) and output projections (d, H Dv) of each layer, from the model's own modules, float64."""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    values, projections = [], []
    for layer in range(2):
        x = hidden[layer]
        if name == "bert":
            block = model.encoder.layer[layer].attention
            value, projection = block.self.value(x), block.output.dense.weight
        elif name == "gpt2":
            block = model.transformer.h[layer]
            value = block.attn.c_attn(block.ln_1(x)).split(32, 2)[2]
            # GPT-2 holds its weights the other way round
            projection = block.attn.c_proj.weight.T
        else:
            block = dict(model.named_modules())[next(n for n, m in model.named_modules() if n.endswith(f".{layer}"))]
            value = block.attention.v_proj(block.layernorm_before(x))
            projection = block.attention.o_proj.weight
        values.append(value.detach().unflatten(2, (4, -1)).transpose(1, 2).double())
        projections.append(projection.detach().double())
    return values, projections


def test_what_cannot_be_joined_across_layers_says_so():
    from tiny_models import t5

    model, ids = eager(t5), tokens()
    with torch.no_grad(), longlens.record(model) as calls:
        with pytest.raises(InputError, match="nothing was recorded yet"):
            len(calls)
        model(input_ids=ids, decoder_input_ids=ids[:, :7])
    with pytest.raises(InputError, match="give the calls of one kind"):
        rollout(calls, queries=[0])
    encoder = [call for call in calls if call.name.startswith("encoder")]
    assert rollout(encoder, queries=[0]).values.shape == (2, 1, 1, 21)
    with pytest.raises(InputError, match=r"layer 1 \(encoder.*call backward"):
        relevance(encoder, queries=[0])
