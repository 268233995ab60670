"""AMPLIFY beside its formulas, written out: interleaved rotation, RMSNorm, SwiGLU."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from family_peer import PROTEINS, differences, load_float64
from longlens.errors import CheckpointError
from longlens.jobs.memory import parameter_count
from longlens.models.pretrained import load

LAYERS, WIDTH, HEADS, NAMED, WIDE = 3, 48, 3, 100, 72
CONFIG = {
    "model_type": "AMPLIFY", "architectures": ["AMPLIFY"], "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "intermediate_size": NAMED, "hidden_act": "SwiGLU", "rms_norm": True,
    "norm_eps": 1e-5, "vocab_size": 27, "max_length": 2048, "layer_norm_before_last_layer": True,
}  # fmt: skip


def weights(vocabulary: int = 27) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{part}.weight": (vocabulary, WIDTH) for part in ("encoder", "decoder")}
    shapes |= {"decoder.bias": (vocabulary,), "layer_norm_2.weight": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {f"transformer_encoder.{i}.{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "wo")}
        shapes |= {f"transformer_encoder.{i}.{part}_norm.weight": (WIDTH,) for part in ("attention", "ffn")}
        shapes[f"transformer_encoder.{i}.ffn.w12.weight"] = (2 * WIDE, WIDTH)
        shapes[f"transformer_encoder.{i}.ffn.w3.weight"] = (WIDTH, WIDE)
    return {
        name: 0.3 * torch.randn(shape, generator=generator) + (1.0 if "norm" in name else 0.0)
        for name, shape in shapes.items()
    }


def rms(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def turn(x):
    """Neighbouring pairs of x (n, heads, D) as complex numbers, turned by position times frequency."""
    width = x.shape[-1]
    frequencies = 1.0 / (10_000.0 ** (torch.arange(0, width, 2).float() / width))
    angles = torch.outer(torch.arange(len(x)).float(), frequencies)
    cos, sin = angles.cos().double().unsqueeze(1), angles.sin().double().unsqueeze(1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(2)


def literal(tokens, tensors):
    """Embedding, each layer, the last one normalised, logits; float64."""
    held = {name: tensor.double() for name, tensor in tensors.items()}
    x = held["encoder.weight"][tokens]
    states = [x]
    for i in range(LAYERS):
        part = {name.split(f"encoder.{i}.")[1]: t for name, t in held.items() if f"transformer_encoder.{i}." in name}
        z = rms(x, part["attention_norm.weight"])
        q, k, v = ((z @ part[f"{name}.weight"].T).view(len(x), HEADS, -1) for name in "qkv")
        q, k = turn(q), turn(k)
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ part["wo.weight"].T
        gate, value = (rms(x, part["ffn_norm.weight"]) @ part["ffn.w12.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * value) @ part["ffn.w3.weight"].T
        states.append(x)
    states[-1] = rms(x, held["layer_norm_2.weight"])
    return [*states, states[-1] @ held["decoder.weight"].T + held["decoder.bias"]]


def write(folder, vocabulary=27, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": vocabulary} | changes))
    save_file(weights(vocabulary), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_layer_equals_the_formulas(tmp_path):
    ours = load_float64(write(tmp_path))
    packed = ours.pack(PROTEINS)
    found = differences(ours, packed, lambda tokens: literal(tokens, weights()))
    assert len(found) == LAYERS + 2
    assert max(found) < 1e-12
    assert ours.config.feed_forward == WIDE
    counted = sum(parameter.numel() for parameter in ours.parameters())
    assert parameter_count(ours.config) - LAYERS * HEADS - 1 == counted
    single = load(tmp_path, dtype="float32")
    assert max(differences(single, packed, lambda tokens: literal(tokens, weights()))) < 1e-5


def test_both_vocabularies(tmp_path):
    small, large = load(write(tmp_path / "a")), load(write(tmp_path / "b", 32))
    assert small.pack("LCX").tokens.tolist() == [3, 6, 25, 1, 4]
    assert large.pack("LCX").tokens.tolist() == [3, 12, 31, 6, 4]
    assert small.alphabet.mask == large.alphabet.mask == 2
    with pytest.raises(CheckpointError, match=r"a vocabulary of 27 or 32 tokens, or a vocab\.txt, got 30"):
        load(write(tmp_path / "c", 30))
    letters = [*("<pad>", "<unk>", "<mask>", "<bos>", "<eos>"), *"ACDEFGHIKLMNPQRSTVWYXBUZO"]
    (tmp_path / "c" / "vocab.txt").write_text("\n".join(letters))
    assert load(tmp_path / "c").pack("AC").tokens.tolist() == [3, 5, 6, 4]
    (tmp_path / "c" / "vocab.txt").write_text("\n".join(letters[1:]))
    with pytest.raises(CheckpointError, match=r"got none of \['<pad>'\]"):
        load(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "another activation: hidden_act = 'relu'"),
        ({"rms_norm": False}, "a model with LayerNorm"),
        ({"att_bias": True}, "a model with biases: att_bias"),
        ({"num_attention_heads": 16}, "an even width of each head, got 48 / 16"),
        ({"intermediate_size": 1}, "a feed-forward block of width 0: intermediate_size = 1"),
        ({"intermediate_size": 200}, r"ffn\.w12\.weight of shape \(144, 48\), expected \(272, 48\)"),
    ],
)
def test_other_configurations_are_refused(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, **change))
