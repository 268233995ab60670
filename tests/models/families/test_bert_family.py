"""BERT over residues, in ProtBert's layout: parity with transformers at every layer."""

from __future__ import annotations

import numpy as np
from transformers import BertConfig, BertForMaskedLM

import longlens
from family_peer import PROTEINS, differences, load_float64, of_transformers, randomise
from longlens.models.pretrained import load

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO"]


def make(folder):
    """Write a folder of random weights, and return the states of transformers' model in float64."""
    model = BertForMaskedLM(BertConfig(
        vocab_size=len(TOKENS), hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96,
        max_position_embeddings=128, attn_implementation="eager",
    )).eval()  # fmt: skip
    randomise(model)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    return of_transformers(model.double())


def test_every_layer_equals_transformers(tmp_path):
    states = make(tmp_path)
    ours = load_float64(tmp_path)
    packed = ours.pack(PROTEINS)
    # the vector of token type 0 is added to the positions, which are read from float32
    assert max(differences(ours, packed, states)) < 1e-7
    assert max(differences(load(tmp_path, dtype="float32"), packed, states)) < 1e-5


def test_rare_residues_are_read_as_x_where_that_is_asked_for(tmp_path):
    make(tmp_path)
    plain = longlens.embed({"a": "MKUZOBX"}, model=tmp_path, include=["per-tok"])
    read = longlens.embed({"a": "MKUZOBX"}, model=tmp_path, include=["per-tok"], rare_as_x=True)
    as_x = longlens.embed({"a": "MKXXXXX"}, model=tmp_path, include=["per-tok"])
    assert np.array_equal(read["a"], as_x["a"])
    assert not np.allclose(plain["a"], as_x["a"])
    assert read.manifest["model"]["reading"] == {"rare_as": "X"}
    assert "reading" not in plain.manifest["model"]
    assert plain.manifest["job"]["model"] != read.manifest["job"]["model"]
