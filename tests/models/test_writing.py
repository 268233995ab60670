"""A model of every family is written as the folder that it was read from was: the same tensors under the same names."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, EsmcForMaskedLM, EsmForMaskedLM, T5EncoderModel, T5ForConditionalGeneration

import longlens
import parity
from family_peer import PROTEINS, differences, load_float64, of_transformers
from longlens.errors import CheckpointError
from longlens.finetuning.lora import Adapters
from longlens.models.pretrained import save

CASES = {case.family: case for case in parity.cases()}
with parity.tests_on_path():
    import t5_peer
READERS = {
    "ESM-2": EsmForMaskedLM, "SaProt": EsmForMaskedLM, "ESM-1b": EsmForMaskedLM, "ESM-1v": EsmForMaskedLM,
    "ESM-C": EsmcForMaskedLM, "BERT": BertForMaskedLM, "ProtT5": T5EncoderModel, "Ankh": T5EncoderModel,
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*non-commercial.*:longlens.errors.LonglensWarning")


@pytest.mark.parametrize("family", CASES)
def test_what_was_read_is_written_again(family, tmp_path):
    CASES[family].make(tmp_path / "before")
    model = longlens.load(tmp_path / "before", dtype="float32")
    save(model, tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    # rows that positions hold here already, and what no language model of residues has
    moved = {"bert.embeddings.position_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"}
    assert after.keys() == {name for name in before if "pooler" not in name}
    for name in after.keys() - moved:
        assert torch.equal(before[name].float(), after[name].float()), name
    if family == "BERT":
        rows, first = (part[name] for part, name in zip((before, before), sorted(moved), strict=True))
        assert torch.equal(after[min(moved)], rows + first[0])
        assert not after[max(moved)].any()
    again = longlens.load(tmp_path / "after", dtype="float32")
    assert again.alphabet == model.alphabet
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", CASES)
def test_merged_adapters_are_in_what_is_written(family, tmp_path):
    CASES[family].make(tmp_path / "before")
    model = longlens.load(tmp_path / "before", dtype="float32")
    adapters = Adapters.make(model, 2, 4, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapters.parameters().items():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    packed = model.pack(PROTEINS)
    before = model(packed).last
    # with gradients, as training computes it
    with adapters.trained():
        trained = model(packed).last
    with adapters.merged():
        save(model, tmp_path / "after")
    again = longlens.load(tmp_path / "after", dtype="float32")(packed).last
    torch.testing.assert_close(again, trained, rtol=1e-4, atol=1e-4)
    assert (again - before).norm() > 0.05 * before.norm()
    # the model itself is as it was
    assert torch.equal(model(packed).last, before)
    if family in READERS:
        theirs = READERS[family].from_pretrained(tmp_path / "after", dtype=torch.float64).eval()
        states = of_transformers(theirs) if hasattr(theirs, "lm_head") or family == "BERT" else None
        if states is None:
            states = t5_peer.states_of(t5_peer.in_float64(theirs))
        assert max(differences(load_float64(tmp_path / "after"), packed, states)) < 1e-6


def test_weights_of_the_model_are_written_not_those_of_its_folder(tmp_path):
    CASES["ESM-C"].make(tmp_path / "before")
    model = longlens.load(tmp_path / "before", dtype="float32")
    with torch.no_grad():
        model.encoder.layers[1].down.weight.zero_()
    save(model, tmp_path / "after", torch.bfloat16)
    assert not longlens.load(tmp_path / "after").encoder.layers[1].down.weight.any()
    assert {tensor.dtype for tensor in load_file(tmp_path / "after" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "after" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_can_be_written_over_the_one_that_was_read(tmp_path):
    CASES["ESM-C"].make(tmp_path)
    model = longlens.load(tmp_path, dtype="float32")
    with torch.no_grad():
        model.encoder.layers[0].down.weight.zero_()
    save(model, tmp_path)
    assert not longlens.load(tmp_path).encoder.layers[0].down.weight.any()


def test_the_decoder_of_a_t5_is_left_out_and_its_encoder_equal(tmp_path):
    whole = t5_peer.with_decoder("ProtT5")
    t5_peer.save(whole, tmp_path / "before", "ProtT5")
    model = longlens.load(tmp_path / "before", dtype="float32")
    save(model, tmp_path / "after")
    assert not any(name.startswith("decoder.") for name in load_file(tmp_path / "after" / "model.safetensors"))
    ids = torch.tensor([[5, 6, 7, 1]])
    wanted = T5ForConditionalGeneration.from_pretrained(tmp_path / "before").encoder(ids).last_hidden_state
    assert torch.equal(T5EncoderModel.from_pretrained(tmp_path / "after")(ids).last_hidden_state, wanted)


def test_a_model_is_written_over_one_in_several_files_and_not_through_links(tmp_path):
    CASES["ESM-C"].make(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    several, linked = tmp_path / "several", tmp_path / "linked"
    several.mkdir()
    linked.mkdir()
    (several / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, several / shard, metadata={"format": "pt"})
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (several / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path / "one").iterdir():
        # as the hub's cache has its files
        (linked / path.name).symlink_to(path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    for folder in (several, linked):
        model = longlens.load(folder, dtype="float32")
        with torch.no_grad():
            model.encoder.layers[0].down.weight.zero_()
        save(model, folder)
        assert not longlens.load(folder).encoder.layers[0].down.weight.any()
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == before


def test_the_folder_that_was_read_may_be_gone_and_strange_files_in_it_are_not_copied(tmp_path):
    CASES["ESM-C"].make(tmp_path / "before")
    (tmp_path / "before" / "train.log.txt").write_text("step 1")
    model = longlens.load(tmp_path / "before", dtype="float32")
    shutil.rmtree(tmp_path / "before")
    save(model, tmp_path / "after")
    assert longlens.load(tmp_path / "after").config == model.config
    assert {path.name for path in (tmp_path / "after").iterdir()} == {"config.json", "model.safetensors"}


def test_a_model_of_another_architecture_that_was_read_from_no_folder_is_refused(tmp_path):
    CASES["ESM-C"].make(tmp_path / "before")
    model = longlens.load(tmp_path / "before")
    model.written = None
    with pytest.raises(CheckpointError, match=r"expected a model that can be written, .* give the model's folder"):
        save(model, tmp_path / "after")
    assert not (tmp_path / "after").exists()
