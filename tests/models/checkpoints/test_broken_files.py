"""Broken and hostile checkpoints: an error of ours that says what is wrong, before anything large is allocated."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from esm_peer import esm, save
from longlens.errors import CheckpointError
from longlens.models.pretrained import load


@pytest.fixture
def folder(tmp_path):
    return save(esm(2, 32, 4), tmp_path / "model")


def configure(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def as_bin(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"num_hidden_layers": "2"}, "num_hidden_layers to be a whole number from 1 to .*, got '2'"),
        ({"num_hidden_layers": -2}, "num_hidden_layers to be a whole number from 1 to .*, got -2"),
        ({"num_hidden_layers": True}, "num_hidden_layers to be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers to be a whole number from 1 to 10,000,000, got 1000000000"),
        ({"num_hidden_layers": 10**6}, "expected 1,000,000 layers as the configuration says, got 43 tensors in all"),
        ({"hidden_size": 32.0}, "hidden_size to be a whole number"),
        ({"hidden_size": 10**7}, r"of shape \(33, 32\), expected \(33, 10000000\)"),
        ({"hidden_size": 4 * 10**12}, "hidden_size to be a whole number"),
        ({"intermediate_size": 10**7}, r"of shape \(128, 32\), expected \(10000000, 32\)"),
        ({"intermediate_size": None}, "intermediate_size to be a whole number from 1 to .*, got None"),
        ({"num_attention_heads": 0}, "num_attention_heads to be a whole number from 1"),
        ({"num_attention_heads": 5}, "the width to be a multiple of the heads, got 32 and 5"),
        ({"num_attention_heads": 32}, "an even width of each head for rotary positions, got 32 / 32"),
        ({"vocab_size": [33]}, "vocab_size to be a whole number"),
        ({"layer_norm_eps": "1e-5"}, r"layer_norm_eps to be a number in \(0, 1\], got '1e-5'"),
        ({"layer_norm_eps": float("nan")}, r"layer_norm_eps to be a number in \(0, 1\], got nan"),
        ({"token_dropout": "no"}, "token_dropout to be true or false, got 'no'"),
        ({"mask_token_id": 99}, "mask_token_id below the vocabulary of 33, got 99"),
        ({"model_type": ["esm"]}, r"got model_type \['esm'\]"),
    ],
    ids=str,
)
def test_entries_of_a_wrong_type_or_size(folder, entries, words):
    configure(folder, **entries)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1, 2]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"{", "expected JSON, got something else"),
        (b"\xff\xfe\x00", "expected JSON, got something else"),
        (b"[" * 200_000, "expected JSON, got something else"),
        (b'{"model_type": "esm", "position_embedding_type": "rotary"}', "expected an entry 'vocab_size', found none"),
    ],
    ids=["list", "null", "cut", "bytes", "deep", "empty"],
)
def test_a_configuration_that_is_none(folder, content, words):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"is_folding_model": True, "architectures": ["EsmForProteinFolding"]}, "got ESMFold: is_folding_model = True"),
        ({"position_embedding_type": "relative_key"}, "got an ESM with other positions: position_embedding_type"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            r"got model_type 'llama' \(LlamaForCausalLM\); .*longlens.hf.attach",
        ),
        ({"model_type": "gpt2", "_name_or_path": "nferruz/ProtGPT2"}, "got ProtGPT2: .*; longlens.hf.attach serves it"),
        ({"model_type": "x", "_name_or_path": "lightonai/RITA_s"}, "got RITA: its code is its own"),
        ({"model_type": "x", "_name_or_path": "D:\\models\\esm_msa1b_t12\\"}, "got MSA Transformer"),
        ({"model_type": "x", "_name_or_path": "/home/rita/margarita/esm2"}, "got model_type 'x'"),
        ({"model_type": "progen", "architectures": ["ProGenForCausalLM"]}, "got ProGen2: .* does not serve it either"),
        ({"model_type": "esm", "architectures": ["EsmForDPLM"]}, "got DPLM: "),
        ({"model_type": "bert", "is_decoder": True}, "got a decoder: is_decoder = True"),
    ],
    ids=str,
)
def test_other_architectures_are_named(folder, entries, words):
    configure(folder, **entries)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"{", "expected JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"{}", "expected weight_map to map tensors to files"),
        (b'{"weight_map": ["a"]}', "expected weight_map to map tensors to files"),
        (b'{"weight_map": {"a": 5}}', "expected weight_map to map tensors to files"),
        (b'{"weight_map": {}}', "expected weight_map to map tensors to files"),
        (b'{"weight_map": {"a": "../outside.safetensors"}}', r"names of files beside it, got '\.\./outside"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "names of files beside it, got '/etc/passwd'"),
        (b'{"weight_map": {"a": "..\\\\outside.safetensors"}}', "names of files beside it"),
        (b'{"weight_map": {"a": ".."}}', "names of files beside it"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', "which the index names, found none"),
    ],
)
@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_a_broken_index_or_one_that_leads_elsewhere(folder, stem, index, words):
    # outside lies what would be read
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / f"{stem}.index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_a_tensor_in_two_shards(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for shard in ("a.safetensors", "b.safetensors"):
        (folder / shard).write_bytes(whole)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"each tensor once, got .* in .*a.safetensors and .* in .*b.safetensors"):
        load(folder)


def test_links_are_followed(folder, tmp_path):
    # as the hub's cache lies on the disk
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("config.json", "model.safetensors"):
        (linked / name).symlink_to(folder / name)
    assert load(linked).config.layers == 2


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
@pytest.mark.parametrize("cut", [0, 5, 0.5, 0.95])
def test_cut_files(folder, kind, cut):
    path = folder / "model.safetensors"
    if kind != "safetensors":
        tensors = load_file(path)
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "bin")
    whole = path.read_bytes()
    path.write_bytes(whole[: cut if isinstance(cut, int) else int(cut * len(whole))])
    with pytest.raises(CheckpointError, match=r"one that is cut off or of another kind .*; fetch it again"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "a dictionary of tensors, got list"),
        ({"a": 5}, "a dictionary of tensors, got 'a': int"),
        ({5: torch.ones(1)}, "a dictionary of tensors, got 5: Tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "ordinary tensors, got a .layout torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "ordinary tensors, got a .*device meta"),
        ({"a": torch.ones(1).expand(10**6)}, "has 4 bytes in the file, fewer than its values need"),
        ({"model": {"a": torch.ones(1)}}, "got 'model': dict"),
        ({"a": torch.ones(1)}, "missing esm.embeddings.word_embeddings.weight, got 1 tensors: a"),
        ({"a": nn.Linear(1, 1)}, "got torch.nn.modules.linear.Linear; Weights only load failed"),
    ],
    ids=["list", "number", "key", "sparse", "meta", "expanded", "nested", "other", "module"],
)
def test_other_content(folder, content, words):
    as_bin(folder, content)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize("dtype", ["int64", "int8", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("packed", [False, True])
def test_numbers_that_are_no_floats(folder, dtype, packed):
    tensors = load_file(folder / "model.safetensors")
    name = "esm.encoder.layer.0.output.dense.weight"
    tensors[name] = torch.ones(32, 128).to(getattr(torch, dtype))
    if packed:
        as_bin(folder, tensors)
    else:
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} of dtype \w+, expected one of float32"):
        load(folder)


def test_code_in_a_pickle_is_neither_run_nor_a_raw_error(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    as_bin(folder, {"x": Evil()})
    torch.save({"cfg": {"model": Evil()}, "model": {}}, tmp_path / "esm2.pt")
    for path in (folder, tmp_path / "esm2.pt"):
        with pytest.raises(CheckpointError, match=r"got exec; Weights only load failed.*is not run"):
            load(path)
    assert not (tmp_path / "ran").exists()


def namespace(**changes):
    sizes = {"encoder_layers": 2, "encoder_embed_dim": 32, "encoder_attention_heads": 4, "token_dropout": True}
    return argparse.Namespace(**{name: value for name, value in (sizes | changes).items() if value is not None})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(1), "with cfg.model, or of ESM-1b or ESM-1v, got a Tensor"),
        ({}, "got keys none"),
        ({"cfg": 5, "model": {}}, "got keys cfg, model"),
        ({"cfg": {"model": namespace()}}, "got keys cfg"),
        ({"cfg": {"model": namespace(encoder_layers=None)}, "model": {}}, "expected an entry 'encoder_layers'"),
        ({"cfg": {"model": namespace(encoder_layers="6")}, "model": {}}, "encoder_layers to be a whole number"),
        (
            {"cfg": {"model": namespace(encoder_layers=10**6)}, "model": {}},
            "missing embed_tokens.weight, got 0 tensors",
        ),
        ({"cfg": {"model": namespace()}, "model": {"a": 5}}, "a dictionary of tensors, got 'a': int"),
        ({"args": argparse.Namespace(arch="roberta_large"), "model": {}}, "expected embed_positions.weight"),
        ({"args": argparse.Namespace(arch="msa_transformer"), "model": {}}, "got MSA Transformer"),
        ({"model": {"contact_head.regression.weight": torch.ones(1, 1)}}, "got a contact regression alone"),
        ({"esm.embeddings.word_embeddings.weight": torch.ones(1, 1)}, "got tensors without a configuration"),
    ],
    ids=[
        "tensor",
        "empty",
        "cfg",
        "no model",
        "no layers",
        "word",
        "layers",
        "number",
        "ESM-1b",
        "MSA",
        "contacts",
        "bare",
    ],
)
def test_other_files_than_those_of_fair_esm(tmp_path, content, words):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path / "x.pt")


def test_a_cut_or_foreign_pt_file(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"cfg": {"model": namespace()}, "model": {"embed_tokens.weight": torch.ones(33, 32)}}, path)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"not a file of weights", b"\x80\x04."):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"x\.pt: expected a file of weights, got one that is cut off"):
            load(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"A\nC\n"])
def test_a_vocabulary_that_is_none(folder, content):
    configure(folder, model_type="bert", position_embedding_type="absolute")
    (folder / "vocab.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"vocab\.txt: expected (tokens in UTF-8|the tokens)"):
        load(folder)
