"""ESM-1b and ESM-1v: parity with transformers, fair-esm's files with their unzeroed `<mask>`, and the limit."""

from __future__ import annotations

import argparse

import pytest
import torch
from transformers import EsmConfig, EsmForMaskedLM

import longlens
from family_peer import PROTEINS, differences, load_float64, of_transformers, randomise
from longlens.errors import CheckpointError, InputError
from longlens.jobs.memory import parameter_count
from longlens.models.families.esm1 import FAIR_ESM1
from longlens.models.pretrained import load, read_config

LAYERS, WIDTH, HEADS, ROWS = 2, 32, 4, 82


def peer(*, normed: bool, dtype: torch.dtype = torch.float64) -> EsmForMaskedLM:
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, intermediate_size=4 * WIDTH, layer_norm_eps=1e-5, token_dropout=True,
        position_embedding_type="absolute", emb_layer_norm_before=normed, max_position_embeddings=ROWS,
    )  # fmt: skip
    model = EsmForMaskedLM(config).eval()
    randomise(model)
    with torch.no_grad():
        # as fair-esm's loader and the published folders have it
        model.esm.embeddings.word_embeddings.weight[32] = 0.0
        model.esm.embeddings.word_embeddings.weight[1] = 0.0
    return model.to(dtype)


@pytest.mark.parametrize("normed", [True, False], ids=["ESM-1b", "ESM-1v"])
def test_every_layer_equals_transformers_in_float64(tmp_path, normed):
    theirs = peer(normed=normed)
    theirs.float().save_pretrained(tmp_path)
    theirs.double()
    ours = load_float64(tmp_path)
    packed = ours.pack(PROTEINS)
    # some masked, so that the rescaling by their share matters
    packed.tokens[[3, 9, 10]] = 32
    found = differences(ours, packed, of_transformers(theirs))
    assert len(found) == LAYERS + 2
    assert max(found) < 1e-12
    assert parameter_count(ours.config) == sum(parameter.numel() for parameter in ours.parameters())
    assert max(differences(load(tmp_path, dtype="float32"), packed, of_transformers(theirs))) < 1e-5


def test_a_protein_beyond_the_table_is_refused_with_the_limit(tmp_path):
    peer(normed=True, dtype=torch.float32).save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config.max_length == ROWS - 2 == read_config(tmp_path).max_length
    assert ours(ours.pack("A" * (ROWS - 4))).last.shape == (ROWS - 2, WIDTH)
    with pytest.raises(InputError, match="sequences of at most 80 tokens, got 81"):
        ours(ours.pack("A" * (ROWS - 3)))
    with pytest.raises(InputError, match="at most 78 residues for this model"):
        longlens.embed({"long": "A" * 79}, model=ours)


def fair_file(theirs: EsmForMaskedLM, path, *, normed: bool, prefixed: bool) -> None:
    """A file as fair-esm published it: settings in `args`, and a `<mask>` row that is not zero."""
    there = theirs.state_dict()
    names = {
        "embed_tokens": "esm.embeddings.word_embeddings", "embed_positions": "esm.embeddings.position_embeddings",
        "emb_layer_norm_after": "esm.encoder.emb_layer_norm_after",
    }  # fmt: skip
    if normed:
        names["emb_layer_norm_before"] = "esm.embeddings.layer_norm"
    for i in range(LAYERS):
        here, layer = f"layers.{i}", f"esm.encoder.layer.{i}"
        names |= {f"{here}.self_attn.{part[0]}_proj": f"{layer}.attention.self.{part}" for part in ("query", "key")}
        names |= {
            f"{here}.self_attn.v_proj": f"{layer}.attention.self.value",
            f"{here}.self_attn.out_proj": f"{layer}.attention.output.dense",
            f"{here}.self_attn_layer_norm": f"{layer}.attention.LayerNorm",
            f"{here}.fc1": f"{layer}.intermediate.dense", f"{here}.fc2": f"{layer}.output.dense",
            f"{here}.final_layer_norm": f"{layer}.LayerNorm",
        }  # fmt: skip
    state = {}
    for here, theirs_name in names.items():
        for kind in ("weight", "bias"):
            if f"{theirs_name}.{kind}" in there:
                state[f"encoder.sentence_encoder.{here}.{kind}"] = there[f"{theirs_name}.{kind}"].clone()
    for part in ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "bias"):
        state[f"encoder.lm_head.{part}"] = there[f"lm_head.{part}"].clone()
    embedding = state["encoder.sentence_encoder.embed_tokens.weight"]
    embedding[32] = 3.0
    state["encoder.lm_head.weight"] = embedding.clone()
    sizes = {"layers": LAYERS, "embed_dim": WIDTH, "ffn_embed_dim": 4 * WIDTH, "attention_heads": HEADS}
    settings = {f"encoder_{name}" if prefixed else name: value for name, value in sizes.items()}
    args = argparse.Namespace(arch="roberta_large", token_dropout=True, max_positions=ROWS - 2, **settings)
    torch.save({"args": args, "model": state}, path)


@pytest.mark.parametrize(("normed", "prefixed"), [(True, True), (False, False)])
def test_a_fair_esm_file_gives_the_folders_model(tmp_path, normed, prefixed):
    theirs = peer(normed=normed, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "folder")
    fair_file(theirs, tmp_path / "esm1.pt", normed=normed, prefixed=prefixed)
    expected, found = load(tmp_path / "folder").state_dict(), load(tmp_path / "esm1.pt").state_dict()
    assert {name for name in expected if "contact" not in name} == found.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert not found["encoder.embedding.weight"][32].any()


def test_a_broken_file_is_refused(tmp_path):
    args = argparse.Namespace(arch="roberta_large", layers=2, embed_dim=32, attention_heads=4, ffn_embed_dim=128)
    torch.save({"args": args, "model": {"encoder.x": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"expected embed_positions\.weight"):
        load(tmp_path / "a.pt")
    assert FAIR_ESM1.position == "embed_positions.weight"
