"""T5 encoders: parity with transformers at every layer, their tokens, what is left out and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import t5_pass
import torch
from safetensors.torch import load_file, save_file

import longlens
from family_peer import PROTEINS, differences, load_float64
from longlens.errors import CheckpointError, InputError, LonglensWarning
from longlens.jobs.memory import model_size, parameter_count
from longlens.jobs.plan import BatchOutputs, batch_bytes
from longlens.models.families.entries import ConfigEntries
from longlens.models.families.t5 import ANKH, PROT_T5, PROTT5
from longlens.models.pretrained import load, read_config
from longlens.testing import peak_growths
from longlens.testing.memory import LINEAR
from t5_peer import (
    SHAPES,
    encoder,
    in_float64,
    pieces_of,
    save,
    states_of,
    with_decoder,
    write_json,
    write_sentencepiece,
)

LONG = (*PROTEINS, "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEV" * 9)
pytestmark = pytest.mark.filterwarnings("ignore:.*non-commercial.*:longlens.errors.LonglensWarning")


@pytest.mark.parametrize("name", SHAPES)
def test_every_layer_equals_transformers(tmp_path, name):
    theirs = encoder(name)
    save(theirs, tmp_path, name)
    ours = load_float64(tmp_path)
    packed = ours.pack(LONG)
    assert max(differences(load(tmp_path, dtype="float32"), packed, states_of(theirs))) < 1e-5
    found = differences(ours, packed, states_of(in_float64(theirs)))
    assert len(found) == ours.config.layers + 1
    assert max(found) < 1e-12
    assert parameter_count(ours.config) - ours.config.layers * ours.config.heads - 1 == sum(
        parameter.numel() for parameter in ours.parameters()
    )


def test_packed_equals_alone_and_the_bias_matters(tmp_path):
    ours = load(save(encoder("ProtT5"), tmp_path, "ProtT5"))
    with torch.no_grad():
        packed = ours(ours.pack(LONG)).last
        alone = [ours(ours.pack(protein)).last for protein in LONG]
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
        ours.encoder.relative.weight.zero_()
        assert not torch.allclose(ours(ours.pack(LONG)).last, packed, atol=1e-2)


@pytest.mark.parametrize("name", ["ProtT5", "Ankh"])
def test_gradients_equal_transformers(tmp_path, name):
    theirs = encoder(name)
    save(theirs, tmp_path, name)
    ours = load_float64(tmp_path).requires_grad_(True)
    in_float64(theirs)
    packed = ours.pack(LONG[-1])
    weights = torch.randn(len(packed.tokens), 32, dtype=torch.float64)
    (theirs(input_ids=packed.tokens.unsqueeze(0)).last_hidden_state[0] * weights).sum().backward()
    attention = theirs.encoder.block[0].layer[0].SelfAttention
    for recompute in (False, True):
        ours.encoder.recompute = recompute
        ours.zero_grad()
        (ours(packed).last * weights).sum().backward()
        want = attention.relative_attention_bias.weight.grad
        torch.testing.assert_close(ours.encoder.relative.weight.grad, want, rtol=1e-8, atol=1e-8)
        inner = ours.config.inner
        torch.testing.assert_close(ours.encoder.layers[0].qkv.weight.grad[:inner], attention.q.weight.grad)


def test_tokens_are_residues_then_an_end(tmp_path):
    prot, prost, ankh = (tmp_path / name for name in ("prot", "prost", "ankh"))
    model = load(save(encoder("ProtT5"), prot, "ProtT5"))
    # A = 3, C = 22, X = 23; rare residues are X, as the authors have it
    assert model.pack("ACXUZOB").tokens.tolist() == [3, 22, 23, 23, 23, 23, 23, 1]
    assert (model.alphabet.before, model.alphabet.after) == (0, 1)
    assert load(save(encoder("ProstT5"), prost, "ProstT5")).pack("AC").tokens.tolist() == [149, 3, 22, 1]
    model = load(save(encoder("Ankh 3"), ankh, "Ankh 3"))
    assert model.pack("ACU").tokens.tolist() == [30, 3, 22, pieces_of("Ankh 3").index("U"), 1]


def test_sentencepiece_says_the_same_as_json_and_as_the_fixed_table(tmp_path):
    bare, with_model, with_json = (tmp_path / name for name in ("bare", "model", "json"))
    for folder in (bare, with_model, with_json):
        encoder("ProtT5").save_pretrained(folder)
    write_sentencepiece(with_model / "spiece.model", list(PROT_T5))
    write_json(with_json, "ProtT5")
    encoded = [
        load(folder).alphabet.encode("ACDEFGHIKLMNPQRSTVWYX").tolist() for folder in (bare, with_model, with_json)
    ]
    assert encoded[0] == encoded[1] == encoded[2]


def test_prefixes_may_come_from_added_tokens(tmp_path):
    encoder("ProstT5").save_pretrained(tmp_path)
    write_sentencepiece(tmp_path / "spiece.model", pieces_of("ProstT5")[:128])
    with pytest.raises(CheckpointError, match="expected the tokenizer to have <AA2fold>, found none"):
        load(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<fold2AA>": 148, "<AA2fold>": 149}))
    assert load(tmp_path).pack("A").tokens.tolist() == [149, 3, 1]
    (tmp_path / "added_tokens.json").unlink()
    added = {"149": {"content": "<AA2fold>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert load(tmp_path).pack("A").tokens.tolist() == [149, 3, 1]


def test_decoders_are_left_out(tmp_path):
    theirs = with_decoder("ProtT5")
    save(theirs, tmp_path, "ProtT5")
    ours = load(tmp_path)
    packed = ours.pack(LONG)
    assert max(differences(ours, packed, states_of(theirs.get_encoder()))) < 1e-5
    # the embedding under either name, or under both
    tensors = load_file(tmp_path / "model.safetensors")
    shared = tensors.pop("shared.weight")
    for names in (["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]):
        save_file(
            tensors | {name: shared.clone() for name in names},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        assert torch.equal(load(tmp_path).encoder.embedding.weight, shared)
    save_file(
        tensors | {"encoder.embed_tokens.weight": shared + 1, "shared.weight": shared}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="tied"):
        load(tmp_path)


def test_float16_files_are_read_and_float16_is_refused(tmp_path):
    theirs = encoder("ProtT5").half()
    save(theirs, tmp_path, "ProtT5")
    packed = load(tmp_path).pack(PROTEINS)
    assert load(tmp_path, dtype="float32").dtype == torch.float32
    assert max(differences(load(tmp_path, dtype="float32"), packed, states_of(theirs.float()))) < 1e-5
    assert max(differences(load(tmp_path, dtype="bfloat16"), packed, states_of(theirs))) < 0.1
    for refused in (load, model_size):
        with pytest.raises(CheckpointError, match=r"trained in bfloat16.*use --dtype bfloat16 or float32"):
            refused(tmp_path, dtype="float16")


def test_the_licence_of_ankh_is_said(tmp_path):
    save(encoder("Ankh"), tmp_path / "ankh", "Ankh")
    save(encoder("ProtT5"), tmp_path / "prot", "ProtT5")
    with pytest.warns(LonglensWarning, match="non-commercial"):
        load(tmp_path / "ankh")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "prot")


def test_an_encoder_has_no_logits(tmp_path):
    ours = load(save(encoder("ProtT5"), tmp_path, "ProtT5"))
    assert not ours.predicts
    with pytest.raises(InputError, match=r"whose training had a decoder.*no logits, surprise or scores"):
        ours.logits(ours(ours.pack("ACD")).last)
    with pytest.raises(InputError, match="no logits, surprise or scores"):
        longlens.score("ACDEF", ["A1C"], model=ours)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 32_128}, "expected a T5 of proteins, got a T5 of texts: vocab_size = 32128"),
        ({"feed_forward_proj": "tanh"}, "a T5 with another activation"),
        ({"feed_forward_proj": ["relu"]}, "a T5 with another activation"),
        ({"d_kv": 0}, "expected d_kv to be a whole number from 1"),
        ({"relative_attention_num_buckets": 30}, "expected a multiple of 4 buckets"),
        ({"relative_attention_max_distance": 8}, "expected a multiple of 4 buckets"),
        ({"model_type": "umt5"}, "ProtT5, Ankh or BERT, got model_type 'umt5'"),
    ],
)
def test_other_configurations_are_refused(tmp_path, changes, words):
    save(encoder("ProtT5", num_layers=1), tmp_path, "ProtT5")
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        read_config(tmp_path)


def broken(folder, how):
    path = folder / ("spiece.model" if how in ("cut off", "no message", "no text") else "tokenizer.json")
    if how == "cut off":
        write_sentencepiece(path, list(PROT_T5))
        path.write_bytes(path.read_bytes()[:-4])
    elif how == "no message":
        path.write_bytes(b"\x0f not a protocol buffer")
    elif how == "no text":
        # a piece with its score alone
        path.write_bytes(b"\x0a\x05\x15\x00\x00\x00\x00")
    elif how == "no pieces":
        path.write_text(json.dumps({"model": {}}))
    elif how == "no JSON":
        path.write_text("{")
    elif how == "disagree":
        write_json(folder, "ProtT5")
        write_sentencepiece(folder / "spiece.model", [*PROT_T5[:3], *PROT_T5[:2:-1]])
    elif how == "too many":
        vocabulary = [[f"x{number}", 0.0] for number in range(200)] + [[piece, 0.0] for piece in PROT_T5]
        path.write_text(json.dumps({"model": {"vocab": vocabulary}}))
    else:
        vocabulary = [[piece, 0.0] for piece in PROT_T5 if piece != "▁W"]
        path.write_text(json.dumps({"model": {"vocab": vocabulary}}))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut off", "expected the pieces of a tokenizer, got something else"),
        ("no message", "expected the pieces of a tokenizer"),
        ("no text", "got something else .piece 0 has no text"),
        ("no pieces", "expected the pieces of a tokenizer"),
        ("no JSON", "expected the pieces of a tokenizer"),
        ("disagree", "as the other files of the tokenizer in this folder say"),
        ("too many", "expected tokens below the vocabulary of 128"),
        ("no W", "expected the tokenizer to have W, found none"),
    ],
)
def test_broken_tokenizers_are_named(tmp_path, how, words):
    encoder("ProtT5", num_layers=1).save_pretrained(tmp_path)
    broken(tmp_path, how)
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path)


def test_other_vocabularies_need_a_tokenizer(tmp_path):
    encoder("Ankh", num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"to hold a tokenizer's spiece\.model or tokenizer\.json"):
        load(tmp_path)


def test_parameters_that_are_listed_are_those_of_the_sizes():
    sizes = {  # layers' feed-forward width, width of a head, form
        "Rostlab/prot_t5_xl_half_uniref50-enc": (16_384, 128, "relu"),
        "Rostlab/prot_t5_xl_uniref50": (16_384, 128, "relu"),
        "Rostlab/ProstT5": (16_384, 128, "relu"),
        "ElnaggarLab/ankh-base": (3072, 64, "gated-gelu"),
        "ElnaggarLab/ankh-large": (3840, 64, "gated-gelu"),
        "ElnaggarLab/ankh3-large": (3840, 64, "gated-silu"),
    }
    for family in (PROTT5, ANKH):
        for known in family.known:
            wide, head, form = sizes[known.name]
            entries = {
                "model_type": "t5", "vocab_size": 144, "num_layers": known.layers, "d_model": known.width,
                "num_heads": known.heads, "d_ff": wide, "d_kv": head, "feed_forward_proj": form,
                "relative_attention_num_buckets": 64,
            }  # fmt: skip
            assert family.recognises(entries)
            number, unit = known.parameters.split()
            config = family.config(ConfigEntries(entries, known.name))
            assert parameter_count(config) == pytest.approx(float(number) * {"M": 1e6, "B": 1e9}[unit], rel=0.05)


@pytest.mark.memory
def test_growth_is_linear_and_within_the_plan():
    """The scores of one layer of transformers' own would take 1 GiB at the larger length."""
    lengths = (4096, 8192)
    growths = peak_growths(
        "t5_pass:encode", [{"length": length} for length in lengths], path=[str(Path(__file__).parent)],
        warm_up={"length": 256}, runs=1,
    )  # fmt: skip
    assert growths[1] <= LINEAR * growths[0]
    planned = [batch_bytes(t5_pass.CONFIG, length, 4, BatchOutputs(0, 0)) for length in lengths]
    assert growths[1] <= planned[1]
    # what is planned for each further token, without what any length takes
    assert growths[1] - growths[0] <= planned[1] - planned[0]
