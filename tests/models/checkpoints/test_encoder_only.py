"""Encoders without a language model's head, alone or with a classifier that was fine-tuned on top."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import BertConfig, BertModel, EsmForMaskedLM

import longlens
from esm_peer import esm, save
from longlens.errors import CheckpointError, InputError
from longlens.jobs.score import position_log_probabilities
from longlens.models.pretrained import load
from longlens.models.pretrained import save as save_ours

TEXT = "MKTAYIAKQRX"
KINDS = ("EsmModel", "EsmForSequenceClassification", "EsmForTokenClassification")


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    theirs = esm(2, 32, 4)
    return theirs, save(theirs, tmp_path_factory.mktemp("masked"))


@pytest.fixture(params=[*KINDS, "EsmModel with its prefix"])
def folder(request, masked, tmp_path):
    name = request.param.split()[0]
    model = getattr(transformers, name).from_pretrained(masked[1])
    state = model.state_dict()
    if request.param not in KINDS:
        state = {f"esm.{key}": value for key, value in state.items()}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    return tmp_path / "model"


def last(model):
    with torch.no_grad():
        return model(model.pack(TEXT)).last


def test_vectors_attention_and_contacts_are_those_of_the_whole_model(folder, masked):
    whole, encoder = load(masked[1]), load(folder)
    assert torch.equal(last(encoder), last(whole))
    assert encoder.device == torch.device("cpu")
    assert encoder.dtype == torch.float32
    assert torch.equal(encoder.predict_contacts(TEXT)[0], whole.predict_contacts(TEXT)[0])


def test_what_needs_the_missing_head_is_refused_when_it_is_asked_for(folder):
    model = load(folder)
    assert not model.predicts
    for ask in (
        lambda: model.logits(last(model)),
        lambda: next(model.log_probabilities(last(model))),
        lambda: position_log_probabilities(model, TEXT, range(2), masked=True),
    ):
        with pytest.raises(InputError, match=r"expected a model with a language model's head.* vectors and attention"):
            ask()


def test_an_encoder_alone_is_written_again_as_it_was(folder, tmp_path):
    model = load(folder)
    save_ours(model, tmp_path)
    again = load(tmp_path)
    assert not again.predicts
    assert torch.equal(last(again), last(model))
    # as a masked language model, which a model is written as that was read from no folder, it lacks its head
    model.written = None
    with pytest.raises(CheckpointError, match="which has none"):
        save_ours(model, tmp_path)


def test_a_masked_language_model_without_its_head_is_broken(masked, tmp_path):
    model = EsmForMaskedLM.from_pretrained(masked[1])
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head.")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"missing lm_head.dense.weight"):
        load(tmp_path)


def test_half_a_head_is_broken(masked, tmp_path):
    model = EsmForMaskedLM.from_pretrained(masked[1])
    model.config.architectures = None
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.dense.bias"}
    torch.save(state, tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing lm_head.dense.bias$"):
        load(tmp_path)


def test_a_bert_without_a_head_gives_vectors(tmp_path):
    config = BertConfig(vocab_size=25, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=96, max_position_embeddings=64)  # fmt: skip
    theirs = BertModel(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    ours = load(tmp_path)
    one = ours.pack(TEXT).tokens.unsqueeze(0)
    with torch.no_grad():
        expected = theirs(one, attention_mask=torch.ones_like(one)).last_hidden_state[0]
    torch.testing.assert_close(last(ours), expected, rtol=1e-5, atol=1e-5)
    assert not ours.predicts


def test_a_loaded_model_trains_when_it_is_told_to(masked):
    model = load(masked[1])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    model(model.pack(TEXT)).last.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


@pytest.fixture
def encoder(masked, tmp_path):
    transformers.EsmModel.from_pretrained(masked[1]).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_jobs_refuse_a_missing_head_before_they_make_a_folder(encoder, tmp_path):
    out = tmp_path / "out"
    for include in ("logits", "surprise"):
        with pytest.raises(InputError, match="expected a model with a language model's head"):
            longlens.embed(TEXT, model=encoder, output=out, include=include)
    with pytest.raises(InputError, match="expected a model with a language model's head"):
        longlens.score(TEXT, ["M1A"], model=encoder, output=tmp_path / "s.csv")
    assert not out.exists()
    assert not list(tmp_path.glob("*s.csv*"))
    assert longlens.embed(TEXT, model=encoder, output=out).names == ["mean/2"]


def test_the_attention_of_an_encoder_is_watched(encoder, masked):
    entropies = []
    for folder in (encoder, masked[1]):
        model = load(folder)
        with torch.no_grad(), longlens.watch(model) as seen:
            model(model.pack(TEXT))
        entropies.append([seen.entropy[layer].values for layer in range(2)])
    for alone, whole in zip(*entropies, strict=True):
        assert torch.equal(alone, whole)
