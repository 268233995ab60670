"""ESM-C: parity with transformers at every layer, from all three layouts of its weights, and chains of a complex."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EsmcConfig, EsmcForMaskedLM

import longlens
from family_peer import PROTEINS, differences, load_float64, of_transformers, randomise
from longlens.errors import CheckpointError, InputError, SequenceError
from longlens.jobs.memory import parameter_count
from longlens.models.families.esmc import esmc_config, hidden_width
from longlens.models.pretrained import load, read_config

LAYERS, WIDTH, HEADS, FEED = 3, 128, 2, 512


def peer(dtype: torch.dtype = torch.float64) -> EsmcForMaskedLM:
    config = EsmcConfig(hidden_size=WIDTH, intermediate_size=FEED, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    model = EsmcForMaskedLM(config).eval()
    randomise(model)
    return model.to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("esmc")
    peer(torch.float32).save_pretrained(path)
    return path


def as_package(tensors):
    """The names and stacks of the package `esm`."""
    out = {"embed.weight": tensors["esmc.embed_tokens.weight"], "transformer.norm.weight": tensors["esmc.norm.weight"]}
    for i in range(LAYERS):
        here, there = f"transformer.blocks.{i}", f"esmc.layers.{i}"
        for kind in ("weight", "bias"):
            out[f"{here}.attn.layernorm_qkv.0.{kind}"] = tensors[f"{there}.input_layernorm.{kind}"]
            out[f"{here}.ffn.0.{kind}"] = tensors[f"{there}.post_attention_layernorm.{kind}"]
        stacks = {
            "attn.layernorm_qkv.1": [f"self_attn.{part}_proj" for part in "qkv"],
            "attn.q_ln": ["self_attn.q_norm"], "attn.k_ln": ["self_attn.k_norm"], "attn.out_proj": ["self_attn.o_proj"],
            "ffn.1": ["mlp.gate_proj", "mlp.up_proj"], "ffn.3": ["mlp.down_proj"],
        }  # fmt: skip
        for name, parts in stacks.items():
            out[f"{here}.{name}.weight"] = torch.cat([tensors[f"{there}.{part}.weight"] for part in parts])
    for number, part in ((0, "dense"), (2, "layer_norm"), (3, "decoder")):
        for kind in ("weight", "bias"):
            out[f"sequence_head.{number}.{kind}"] = tensors[f"lm_head.{part}.{kind}"]
    return {name: tensor.clone() for name, tensor in out.items()}


def as_research(tensors):
    """The names of the research folders, which TransformerEngine wrote, with the state that it adds."""
    out = {}
    for name, tensor in as_package(tensors).items():
        for ours, fused in (
            ("layernorm_qkv.0.weight", "layernorm_qkv.layer_norm_weight"),
            ("layernorm_qkv.0.bias", "layernorm_qkv.layer_norm_bias"),
            ("layernorm_qkv.1.weight", "layernorm_qkv.weight"),
            ("ffn.0.weight", "ffn.layer_norm_weight"), ("ffn.0.bias", "ffn.layer_norm_bias"),
            ("ffn.1.weight", "ffn.fc1_weight"), ("ffn.3.weight", "ffn.fc2_weight"),
        ):  # fmt: skip
            name = name.replace(ours, fused)
        out[name.replace("sequence_head", "lm_head") if "sequence" in name else f"esmc.{name}"] = tensor
    out["esmc.transformer.blocks.0.attn.layernorm_qkv._extra_state"] = torch.zeros(4, dtype=torch.uint8)
    return out


def test_every_layer_equals_transformers_in_float64(folder):
    ours = load_float64(folder)
    found = differences(ours, ours.pack(PROTEINS), of_transformers(peer()))
    assert len(found) == LAYERS + 2
    assert max(found) < 1e-12


def test_float32_packed_equals_padded_transformers(folder):
    ours, theirs = load(folder, dtype="float32"), peer(torch.float32)
    packed = ours.pack(PROTEINS)
    longest = int(packed.cu_seqlens.diff().max())
    padded = torch.full((len(PROTEINS), longest), 1)
    parts = packed.tokens.split(packed.cu_seqlens.diff().tolist())
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    with torch.inference_mode():
        out = theirs(padded, attention_mask=(padded != 1).long(), output_hidden_states=True)
        encoded = ours(packed, keep=range(LAYERS + 1))
        for layer in range(LAYERS + 1):
            for mine, row in zip(
                encoded.layers[layer].split([len(p) for p in parts]), out.hidden_states[layer], strict=True
            ):
                assert (mine - row[: len(mine)]).norm() <= 1e-5 * mine.norm()
        for mine, row in zip(ours.logits(encoded.last).split([len(p) for p in parts]), out.logits, strict=True):
            assert (mine - row[: len(mine)]).norm() <= 1e-5 * mine.norm()


def test_gradients_equal_transformers(folder):
    ours, theirs = load_float64(folder).requires_grad_(True), peer()
    packed = ours.pack(PROTEINS[0])
    ours.logits(ours(packed).last).logsumexp(-1).sum().backward()
    theirs(packed.tokens.unsqueeze(0)).logits.logsumexp(-1).sum().backward()
    layer, there = ours.encoder.layers[1], theirs.esmc.layers[1]
    for mine, wanted in (
        (layer.query_norm.weight, there.self_attn.q_norm.weight), (layer.down.weight, there.mlp.down_proj.weight),
        (ours.encoder.embedding.weight, theirs.esmc.embed_tokens.weight),
    ):  # fmt: skip
        assert (mine.grad - wanted.grad).norm() <= 1e-10 * wanted.grad.norm()
    gate = there.mlp.gate_proj.weight.grad
    assert (layer.up.weight.grad[:FEED] - gate).norm() <= 1e-10 * gate.norm()


def test_the_other_layouts_give_the_same_model(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    expected = load(folder).state_dict()
    research = tmp_path / "research"
    research.mkdir()
    config = {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "architectures": ["ESMCForMaskedLM"]}
    (research / "config.json").write_text(json.dumps(config))
    save_file(as_research(tensors), research / "model.safetensors", metadata={"format": "pt"})
    package = tmp_path / "esmc.pth"
    torch.save(as_package(tensors), package)
    assert read_config(package) == read_config(research) == read_config(folder)
    for path in (research, package):
        state = load(path).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "written", [{"rope_theta": 300.0}, {"rope_parameters": {"rope_theta": 300.0}}, {"rope_scaling": None}], ids=str
)
def test_the_base_of_the_angles_in_either_spelling(folder, tmp_path, written):
    entries = json.loads((folder / "config.json").read_text())
    del entries["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(entries | written))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    ours, theirs = load_float64(tmp_path), EsmcForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert ours.config.positions.base == (10_000.0 if "rope_scaling" in written else 300.0)
    assert max(differences(ours, ours.pack(PROTEINS), of_transformers(theirs))) < 1e-12


def test_an_encoder_saved_without_its_head(folder, tmp_path):
    theirs = peer(torch.float32)
    theirs.esmc.save_pretrained(tmp_path)
    ours = load(tmp_path, dtype="float32")
    assert not ours.predicts
    packed = ours.pack(PROTEINS)
    with torch.inference_mode():
        assert torch.equal(ours(packed).last, load(folder, dtype="float32")(packed).last)
    with pytest.raises(InputError, match="a language model's head"):
        ours.logits(torch.zeros(1, WIDTH))


def test_the_published_sizes():
    sizes = {
        "300M": (30, 960, 15, 2560, 333.0),
        "600M": (36, 1152, 18, 3072, 575.0),
        "6B": (80, 2560, 40, 6912, 6352.0),
    }
    for layers, width, heads, wide, millions in sizes.values():
        assert hidden_width(width) == wide
        config = esmc_config(64, layers, width, heads, wide)
        assert round((parameter_count(config) - layers * heads - 1) / 1e6, 1) == pytest.approx(millions, abs=0.1)
    assert esmc_config(64, 36, 1152, 18, 3072).residual_divisor == 1.0


def test_chains_of_a_complex_are_separated_as_by_sequence_id(folder):
    ours, theirs = load_float64(folder), peer()
    packed = ours.pack(["MKTAYIAK|GAVLIGG|W", "ACDEFG"])
    assert packed.cu_seqlens.tolist() == [0, 20, 28]
    assert packed.chains.tolist() == [0, 10, 18, 20, 28]
    chain = torch.tensor([[0] * 10 + [1] * 8 + [2] * 2])
    with torch.inference_mode():
        wanted = theirs(packed.tokens[:20].unsqueeze(0), sequence_id=chain, output_hidden_states=True)
        encoded = ours(packed, keep=range(LAYERS + 1))
        for layer, states in enumerate(wanted.hidden_states):
            assert (encoded.layers[layer][:20] - states[0]).norm() < 1e-12 * states.norm()
        alone = ours(ours.pack("ACDEFG")).last
        assert (encoded.last[20:] - alone).norm() < 1e-12 * alone.norm()
        joined = ours(ours.pack("MKTAYIAKGAVLIGGW"))
    assert not torch.allclose(joined.last[1:9], encoded.last[1:9])
    with longlens.watch(ours) as seen, torch.inference_mode():
        ours(packed)
    assert (seen.top_keys[0].index[0, :, :10] < 10).all()


def test_chains_that_cannot_be(folder):
    ours = load(folder)
    for texts, message in (
        ("MK||GA", "sequence 1, chain 2: expected at least one residue"),
        ("|MK", "sequence 1, chain 1: expected at"),
        (["MK|GA", "ACD|EFG", "MK|G4"], "sequence 3, chain 2: expected amino acids .* got '4' at position 2"),
        (["MK|GA", "AC9"], "sequence 2: expected amino acids"),
        (["MK|GA", 5], "sequence 2: expected a string"),
        ([], "at least one protein"),
    ):
        with pytest.raises(SequenceError, match=message):
            ours.pack(texts)
    with pytest.warns(UserWarning, match="sequence 2: 1 residues"):
        ours.pack(["MK", "MK|JA"])
    with pytest.raises(SequenceError, match=r"got '\|' at position 3; split a complex"):
        longlens.load("tiny").pack("MK|GA")
    with pytest.raises(InputError, match="single chains"):
        longlens.models.language_model.MaskedLM.predict_contacts(_with_contacts(ours), "MK|GA")


def _with_contacts(model):
    from longlens.models.heads import ContactHead

    model.contact_head = ContactHead(LAYERS, HEADS)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "another activation: hidden_act = 'gelu'"),
        ({"attention_bias": True}, "a model with biases: attention_bias = True"),
        ({"num_key_value_heads": 1}, "a model with other heads"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "other rotary positions"),
        ({"rope_parameters": "default"}, "other rotary positions"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "other rotary positions"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "other rotary positions: rope_scaling"),
        ({"rope_theta": 500.0}, "one base of the rotary angles, got rope_theta = 500.0, rope_theta of rope_par"),
        ({"rope_theta": None}, "expected rope_theta to be a number above 0, got None"),
        ({"rope_parameters": {"rope_theta": "10000"}}, "expected rope_theta of rope_parameters to be a number"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "to be a number above 0, got -1.0"),
        ({"hidden_size": 127}, "a multiple of the heads"),
        ({"num_hidden_layers": 4}, "missing esmc.layers.3"),
    ],
)
def test_other_configurations_are_refused(folder, tmp_path, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_file_of_other_tensors_is_refused(tmp_path):
    torch.save({"embed.weight": torch.zeros(64, 128)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"expected the tensors of ESM-C, .* got embed\.weight"):
        load(tmp_path / "x.pth")
    torch.save({"embed.weight": torch.zeros(64, 100), "transformer.blocks.0.ffn.3.weight": torch.zeros(100, 256)},
               tmp_path / "y.pth")  # fmt: skip
    with pytest.raises(CheckpointError, match="heads of width 64"):
        load(tmp_path / "y.pth")
