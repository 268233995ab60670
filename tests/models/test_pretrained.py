"""Checkpoints in every format that is read; each tensor accounted for."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from esm_peer import esm, literal, protein, save
from longlens.errors import CheckpointError
from longlens.models import pretrained
from longlens.models.families.esm2 import FAIR_ESM
from longlens.models.pretrained import load


@pytest.fixture
def folder(tmp_path):
    return save(esm(2, 32, 4), tmp_path / "model")


def last(model, text="MKTAYIAKQRX"):
    with torch.no_grad():
        return model(model.pack([text])).last


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_bin_shards_and_old_names_are_read(folder, tmp_path):
    expected = last(load(folder))
    tensors = load_file(folder / "model.safetensors")
    config = (folder / "config.json").read_text()
    as_bin, sharded = tmp_path / "bin", tmp_path / "sharded"
    for other in (as_bin, sharded):
        other.mkdir()
        (other / "config.json").write_text(config)
    # the oldest names of LayerNorm's parameters, and frequencies in every layer, as transformers 4 wrote them
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in tensors.items()}  # fmt: skip
    starred = [name for name in old if name.endswith("inv_freq")]
    frequencies = old.pop(starred[0])
    for layer in range(2):
        old[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = frequencies.clone()
    torch.save(old, as_bin / "pytorch_model.bin")
    names = sorted(tensors)
    parts = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, sharded / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for other in (as_bin, sharded):
        assert torch.equal(last(load(other)), expected)


def test_what_we_save_both_read(folder, tmp_path):
    from transformers import EsmForMaskedLM

    ours = load(folder)
    pretrained.save(ours, tmp_path / "again")
    assert torch.equal(last(load(tmp_path / "again")), last(ours))
    theirs = EsmForMaskedLM.from_pretrained(tmp_path / "again").eval()
    tokens = ours.pack(["MKTAYIAKQRX"]).tokens
    torch.testing.assert_close(literal(theirs, tokens)[0][-1], last(ours), rtol=1e-5, atol=1e-5)


def test_a_fair_esm_file_with_its_regression(folder, tmp_path):
    ours = load(folder)
    held, state, regression = ours.state_dict(), {}, {}
    for name, targets in FAIR_ESM.table(ours.config).items():
        for target, part in zip(targets, held[name].chunk(len(targets)), strict=True):
            if "contact_head" in target:
                regression[target] = part.clone()
            else:
                state[f"encoder.sentence_encoder.{target}"] = part.clone()
    state = {name.replace("sentence_encoder.lm_head", "lm_head"): tensor for name, tensor in state.items()}
    state["encoder.lm_head.weight"] = held["encoder.embedding.weight"].clone()
    for layer in range(2):
        state[f"encoder.sentence_encoder.layers.{layer}.self_attn.rot_emb.inv_freq"] = (
            ours.encoder.rotary.frequencies.clone()
        )
    cfg = argparse.Namespace(encoder_layers=2, encoder_embed_dim=32, encoder_attention_heads=4, token_dropout=True)
    path = tmp_path / "esm2_small.pt"
    torch.save({"cfg": {"model": cfg}, "model": state}, path)
    without = load(path)
    assert without.contact_head is None
    assert torch.equal(last(without), last(ours))
    torch.save({"model": regression}, tmp_path / "esm2_small-contact-regression.pt")
    assert torch.equal(load(path).contact_head.regression.weight, ours.contact_head.regression.weight)


def test_code_in_a_pickle_is_not_run(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("esm.encoder.layer.1.output.dense.bias"), "missing esm.encoder.layer.1.output.dense.bias"),
        (lambda t: t.update({"esm.encoder.layer.7.x": torch.ones(1)}), "extra esm.encoder.layer.7.x"),
        (lambda t: t.update({"lm_head.bias": torch.ones(5)}), r"lm_head.bias of shape \(5,\), expected \(33,\)"),
        (lambda t: t.update({"lm_head.decoder.weight": torch.ones(33, 32)}), "lm_head.decoder.weight to equal"),
        (lambda t: t.update({"esm.rotary_embeddings.inv_freq": torch.ones(3)}), "inv_freq of shape"),
    ],
)
def test_every_tensor_is_accounted_for(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_other_architectures_are_refused_by_the_setting_that_differs(folder):
    config = json.loads((folder / "config.json").read_text())
    for name, value, words in (
        ("position_embedding_type", "absolute", "missing esm.embeddings.position_embeddings"),
        ("emb_layer_norm_before", True, "emb_layer_norm_before = True"),
        ("model_type", "gpt2", "got model_type 'gpt2'"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(CheckpointError, match=words):
            load(folder)


def test_norm_eps_comes_from_the_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    assert load(folder).encoder.norm.eps == 0.5


def test_a_bert_equals_the_literal_one_at_every_layer(tmp_path):
    config = BertConfig(vocab_size=25, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
                        intermediate_size=96, max_position_embeddings=64)  # fmt: skip
    theirs = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"])
    )
    ours = load(tmp_path)
    packed = ours.pack(["MKTAYIAKQRX", "GAV"])
    with torch.no_grad():
        encoded = ours(packed, keep=range(4))
        logits = ours.logits(encoded.last)
    for start, stop in packed.cu_seqlens.unfold(0, 2, 1).tolist():
        states, expected = literal(theirs, packed.tokens[start:stop])
        for layer, state in enumerate(states):
            torch.testing.assert_close(encoded.layers[layer][start:stop], state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits[start:stop], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="at most 64 tokens, got 72"):
        ours(ours.pack([protein(70, 0)]))


def test_dtypes_and_wrong_names(folder, tmp_path):
    assert load(folder).dtype == torch.float32
    half = load(folder, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert last(half).dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="expected dtype auto, float32, bfloat16, float16, got 'int8'"):
        load(folder, dtype="int8")
    with pytest.raises(CheckpointError, match="found nothing at"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json, found none"):
        load(tmp_path)
