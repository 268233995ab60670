"""Parts of a text hidden from models of transformers, against the model itself with a 4-D mask in float64."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf

import text_models as texts
from longlens.hf.arguments import AttentionArguments
from longlens.hf.documents import read_document
from longlens.hf.hiding import TextContext
from longlens.hf.language_heads import language_head
from longlens.hf.texts import load_text_model


def _opt(folder):
    tokenizer = texts.byte_level()
    torch.manual_seed(0)
    config = tf.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        word_embed_proj_dim=32, init_std=0.3, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=1, dropout=0.0,
    )  # fmt: skip
    return texts.save(tf.OPTForCausalLM(config), tokenizer, folder)


def _mistral(folder):
    tokenizer = texts.byte_level()
    torch.manual_seed(0)
    config = tf.MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, initializer_range=0.3, max_position_embeddings=512, sliding_window=16,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return texts.save(tf.MistralForCausalLM(config), tokenizer, folder)


MAKE = {
    "gpt2": texts.gpt2_folder, "llama": texts.llama_folder, "opt": _opt, "mistral": _mistral, "bert": texts.bert_folder
}  # fmt: skip

# a step of a bias, large beside the rounding of norms that models compute in float32 whatever their dtype
EPS = 1e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: load_text_model(str(make(root / name))) for name, make in MAKE.items()}


def _subject(model, text=texts.TEXT, budget=16_384):
    head = language_head(model.model)
    return TextContext(model, head, read_document(model, text, "text", causal=head.causal), budget)


def _masked_by_the_model(subject, target, span, window=None):
    """-log p of the target by transformers' eager attention with a 4-D mask, in float64."""
    model = copy.deepcopy(subject.model.model).double()
    model.set_attn_implementation("eager")
    ids = subject.ids[None].clone()
    count = ids.shape[1]
    allowed = torch.ones(count, count, dtype=torch.bool)
    if span is not None:
        allowed[:, slice(*span)] = False
    if subject.causal:
        allowed = allowed.tril()
        if window is not None:
            allowed = allowed.triu(1 - window)
    else:
        ids[0, target] = subject.mask
        allowed[:, target] = True
    mask = torch.zeros(1, 1, count, count, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(count)[None]).logits[0]
    row = target - 1 if subject.causal else target
    return -logits[row].log_softmax(-1)[subject.ids[target]].item()


@pytest.mark.parametrize("name", MAKE)
def test_the_exact_form_is_the_model_with_the_stretch_masked(models, name):
    subject = _subject(models[name])
    window = 16 if name == "mistral" else None
    assert subject.shares_prefix == (name in ("gpt2", "llama", "opt"))
    target = len(subject) - 8
    # near, far, the beginning, one token, and, of causal models, with the query that predicts
    spans = [(target - 9, target - 4), (10, 25), (1, 6), (target - 3, target - 2), (target - 6, target), None]
    got = subject.surprise([target] * len(spans), spans)
    expected = [_masked_by_the_model(subject, target, span, window) for span in spans]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    # the beginning is out of reach of two windows of 16
    assert len(np.unique(np.round(got, 4))) == len(spans) - (name == "mistral")


def _gpt_oss(folder):
    """Every layer with sinks, one of two with a sliding window."""
    tokenizer = texts.byte_level(bos=False)
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
        initializer_range=0.3, max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )  # fmt: skip
    return texts.save(tf.GptOssForCausalLM(config), tokenizer, folder)


@pytest.mark.parametrize(
    ("make", "window"), [(lambda folder: texts.gpt2_folder(folder, bos=False), None), (_mistral, 16)]
)
def test_without_a_key_for_the_query_that_predicts_there_is_no_value(tmp_path, make, window):
    subject = _subject(load_text_model(str(make(tmp_path / "model"))))
    target = len(subject) - 8
    first = 0 if window is None else target - window
    nothing_left = [(first, target)] + ([] if window is None else [(first - 5, target)])
    # one key is left, or the query itself stays in sight
    defined = [(first + 1, target), (first, target - 1)]
    spans = [*nothing_left, *defined]
    got = subject.surprise([target] * len(spans), spans)
    assert np.isnan(got[: len(nothing_left)]).all()
    expected = [_masked_by_the_model(subject, target, span, window) for span in defined]
    np.testing.assert_allclose(got[len(nothing_left) :], expected, rtol=1e-4, atol=1e-5)
    estimate = subject.estimate([target], spans).spans[0]
    assert np.isnan(estimate).tolist() == [span in nothing_left for span in spans]


def test_a_sink_is_a_softmax_of_its_own(tmp_path):
    subject = _subject(load_text_model(str(_gpt_oss(tmp_path / "model"))))
    assert not subject.leaves_no_key(12, (0, 12))
    value = subject.surprise([12], [(0, 12)])[0]
    # all of the mass is the sinks', so nothing that was hidden is in the output
    ids = subject.ids.clone()
    ids[:11] = ids[20:31]
    other = _subject(subject.model)
    other.ids = ids
    assert np.isfinite(value)
    assert other.surprise([12], [(0, 12)])[0] == pytest.approx(value, rel=1e-5)
    assert not np.isnan(subject.estimate([12], [(0, 12)]).spans).any()


def test_a_stretch_is_what_stands_in_the_text(models):
    for name in ("gpt2", "bert"):
        subject = _subject(models[name])
        first = len(subject.document.before)
        whole = subject.text((first, len(subject) - len(subject.document.after)))
        assert whole.rstrip("\n") == texts.TEXT.rstrip("\n")
        for start in range(first, len(subject) - 6):
            assert subject.text((start, start + 5)) in texts.TEXT


def test_a_shared_prefix_computes_only_what_follows(models):
    subject = _subject(models["gpt2"])
    target = len(subject) - 8
    subject.surprise([target] * 3, [None, (10, 25), (target - 6, target - 2)])
    assert subject.passes.forward == 3
    assert subject.passes.tokens == target + (target - 25) + 2
    every = _subject(models["gpt2"])
    every.surprise(range(1, len(every)))
    assert (every.passes.forward, every.passes.tokens) == (1, len(every) - 1)


@pytest.mark.parametrize("name", MAKE)
def test_the_estimate_is_minus_the_derivative_by_a_bias_of_the_key(models, name, monkeypatch):
    """By differences, in float64: a bias of +-eps on the scores of key j in every layer and head."""
    model = replace(models[name], model=copy.deepcopy(models[name].model).double())
    subject = _subject(model)
    target = len(subject) - 8
    estimate = subject.estimate([target], [(5, 11)])
    assert (subject.passes.forward, subject.passes.backward) == (1, 1)
    plain = AttentionArguments.attend

    def surprise(key, bias):
        def biased(arguments, method):
            added = torch.zeros(1, 1, 1, arguments.key.shape[2], dtype=torch.float64)
            added[..., key] = bias
            return plain(replace(arguments, bias=added), method)

        with monkeypatch.context() as patched:
            patched.setattr(AttentionArguments, "attend", biased)
            return subject.surprise([target])[0]

    for key in (3, target - 10, target - 1):
        slope = (surprise(key, EPS) - surprise(key, -EPS)) / (2 * EPS)
        assert estimate.keys[0, key] == pytest.approx(-slope, rel=1e-3, abs=5e-4)
    if subject.causal:
        assert not estimate.keys[0, target:].any()


@pytest.mark.parametrize("name", ["gpt2", "mistral", "bert"])
def test_pieces_are_the_text_cut_there(models, name):
    subject = _subject(models[name])
    targets, pieces = [12, 30, 31, 32], [(6, 18), (21, 33), (21, 33), (24, 36)]
    got = subject.in_pieces(targets, pieces)
    for value, target, (start, stop) in zip(got, targets, pieces, strict=True):
        ids = subject.ids[None, start:stop].clone()
        if not subject.causal:
            ids[0, target - start] = subject.mask
        with torch.no_grad():
            logits = subject.model.model(input_ids=ids).logits[0]
        row = target - start - int(subject.causal)
        expected = -logits[row].log_softmax(-1)[subject.ids[target]].item()
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)
    # a causal model runs a piece once for all of its targets
    assert subject.passes.pieces == 12 * (3 if subject.causal else 4)


def test_words_are_found_with_all_of_their_tokens(models):
    subject = _subject(models["gpt2"])
    found = subject.find("dog")
    assert len(found) >= 3
    assert all(
        "dog".startswith(subject.labels[place].strip()) or subject.labels[place].strip() in "dog" for place in found
    )
    assert subject.find("nowhere") == []


def test_the_model_is_what_it_was(models):
    model = models["gpt2"]
    before = model.model.config._attn_implementation
    subject = _subject(model)
    subject.surprise([20], [(5, 9)])
    subject.estimate([20], [(5, 9)])
    assert model.model.config._attn_implementation == before
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert not model.model._forward_hooks
