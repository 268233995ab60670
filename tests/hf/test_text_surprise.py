"""Surprise of the tokens of a text: equal to the model's own logits, in windows as in the whole."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models as tiny
import torch
import transformers as tf
from tokenizers import Tokenizer, models

import text_models as texts
from longlens.errors import InputError, UnsupportedError
from longlens.hf import attach
from longlens.hf.documents import Window, read_document, windows, word_edges
from longlens.hf.language_heads import language_head, rope_warning
from longlens.hf.surprise import read_masked, read_windows
from longlens.hf.texts import load_text_model


def granite():
    return tf.GraniteForCausalLM(tf.GraniteConfig(**{**tiny.DECODER, "logits_scaling": 3.0}))


def cohere():
    return tf.CohereForCausalLM(tf.CohereConfig(**{**tiny.DECODER, "logit_scale": 0.3}))


def qwen3():
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**{**tiny.DECODER, "head_dim": 8}))


def gemma2():
    return tiny.gemma2(final_logit_softcapping=3.0)


HEADS = {f.__name__: f for f in (*tiny.DECODERS.values(), granite, cohere, qwen3, gemma2)}


@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_gives_the_models_logits(name):
    model = HEADS[name]().eval()
    head = language_head(model)
    ids = tiny.tokens(2, 19)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.allclose(head.head(head.hidden(ids).flatten(0, 1)).view_as(expected), expected, atol=1e-4)
    assert head.causal


def test_models_without_a_head_are_refused():
    for model in (tiny.bert(), tiny.llama().model):
        with pytest.raises(InputError, match="has none, so it predicts no tokens"):
            language_head(model)
    with pytest.raises(UnsupportedError, match="encoder with a decoder"):
        language_head(tiny.t5())
    with pytest.raises(InputError, match="expected a transformers model"):
        language_head(torch.nn.Linear(2, 2))
    model = tiny.llama()
    # a head with a step that longlens does not know
    model.forward = lambda **inputs: tf.modeling_outputs.CausalLMOutput(
        logits=type(model).forward(model, **inputs).logits * 1.5
    )
    with pytest.raises(UnsupportedError, match="its own logits differ"):
        language_head(model)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return load_text_model(str(texts.gpt2_folder(tmp_path_factory.mktemp("gpt2"))))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return load_text_model(str(texts.bert_folder(tmp_path_factory.mktemp("bert"))))


def dense(model, ids):
    """(N, V) float64 log-probabilities of each token's own prediction, of the model's logits."""
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)[None]).logits[0].double().log_softmax(-1)


def compare(found, log_p, ids):
    rows = np.arange(len(ids))
    surprise = -log_p[rows, ids].numpy()
    entropy = -(log_p.exp() * log_p).sum(-1).numpy()
    variance = (log_p.exp() * log_p.square()).sum(-1).numpy() - entropy**2
    np.testing.assert_allclose(found.surprise, surprise, atol=1e-5)
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-5)
    np.testing.assert_allclose(found.variance, variance, atol=1e-4)
    assert (found.rank == 1 + (log_p > log_p[rows, ids][:, None]).sum(-1).numpy()).all()


@pytest.mark.parametrize("bos", [None, False])
def test_a_causal_model_equals_its_own_logits(gpt2, bos):
    head = language_head(gpt2.model)
    document = read_document(gpt2, texts.TEXT, "text", causal=True, bos=bos)
    count = len(document)
    group = word_edges(gpt2.tokenizer, len(head.head.weight)).begins
    with attach(gpt2.model, mlp_chunk=16):
        found = read_windows(head, document, windows(count, count, count, causal=True), group=group)
    inputs = document.inputs(0, count)
    log_p = dense(gpt2.model, inputs)
    lost = 1 if bos is False else 0
    assert len(inputs) == count + 1 - lost
    assert np.isnan(found.surprise[:lost]).all()
    compare(slice_of(found, lost), log_p[:-1], document.ids[lost:])
    np.testing.assert_array_equal(found.seen, np.arange(count))
    mass = log_p[:, group].logsumexp(-1).numpy()
    np.testing.assert_allclose(found.begins[lost:], mass[:-1], atol=1e-5)
    assert found.end == pytest.approx(mass[-1], abs=1e-5)


def slice_of(found, lost):
    return type(found)(
        *(column[lost:] if isinstance(column, np.ndarray) else column for column in vars(found).values())
    )


def test_windows_give_what_the_model_gives_of_each(gpt2):
    head = language_head(gpt2.model)
    document = read_document(gpt2, texts.TEXT, "text", causal=True)
    plan = windows(len(document), 20, 8, causal=True)
    found = read_windows(head, document, plan)
    assert found.token.tolist() == list(range(len(document)))
    for window in plan:
        log_p = dense(gpt2.model, document.inputs(window.start, window.stop))
        for token in range(window.first, window.last):
            place = token - window.start
            assert found.surprise[token] == pytest.approx(-float(log_p[place, document.ids[token]]), abs=1e-5)
            assert found.seen[token] == place
    assert found.seen[20:].min() >= 12


def test_a_masked_model_sees_the_token_or_not(bert):
    head = language_head(bert.model)
    assert not head.causal
    document = read_document(bert, "the quick brown fox jumps over the dog", "text", causal=False)
    special = bert.tokenizer.cls_token_id, bert.tokenizer.sep_token_id
    assert (document.before, document.after) == (special[:1], special[1:])
    count = len(document)
    (window,) = windows(count, count, count, causal=False)
    seen = read_windows(head, document, [window])
    inputs = document.inputs(0, count)
    compare(seen, dense(bert.model, inputs)[1:-1], document.ids)
    assert (seen.seen == count - 1).all()
    hidden = read_masked(head, document, window, 0, count, bert.tokenizer.mask_token_id, 3 * len(inputs))
    for token in range(count):
        copy = inputs.copy()
        copy[token + 1] = bert.tokenizer.mask_token_id
        expected = -float(dense(bert.model, copy)[token + 1, document.ids[token]])
        assert hidden.surprise[token] == pytest.approx(expected, abs=1e-5)


def test_windows_cover_each_token_once_and_the_last_ends_with_the_text():
    for count in (1, 7, 20, 33, 64):
        for size, stride in ((1, 1), (5, 2), (8, 8), (20, 7), (64, 3)):
            for causal in (True, False):
                plan = windows(count, size, stride, causal=causal)
                scored = [token for window in plan for token in range(window.first, window.last)]
                assert scored == list(range(count))
                assert all(w.start <= w.first <= w.last <= w.stop for w in plan)
                assert {w.stop - w.start for w in plan} == {min(size, count)}
                assert plan[-1].stop == count
    # nearer to the middle
    assert windows(12, 8, 4, causal=False) == [Window(0, 8, 0, 6), Window(4, 12, 6, 12)]
    for size, stride in ((0, 1), (4, 5), (4, 0)):
        with pytest.raises(InputError, match="expected windows"):
            windows(9, size, stride, causal=True)


def test_tokens_know_their_characters(gpt2):
    document = read_document(gpt2, texts.TEXT, "text", causal=True)
    assert document.pieces[0] == texts.TEXT[: document.stops[0]]
    covered = np.zeros(len(texts.TEXT), bool)
    for start, stop in zip(document.starts, document.stops, strict=True):
        covered[start:stop] = True
    assert covered.all()
    assert gpt2.tokenizer.decode(document.ids) == texts.TEXT


def test_edges_of_words_in_each_kind_of_tokenizer(gpt2, bert):
    edges = word_edges(gpt2.tokenizer, 400)
    number = gpt2.tokenizer.convert_tokens_to_ids
    assert edges.begins[[number("\u0120"), number("\u0120br"), number("\u010a"), gpt2.tokenizer.eos_token_id]].all()
    assert not edges.begins[[number("ow"), 399]].any()
    assert edges.ends[number("\u010a")]
    assert not edges.ends[number("\u0120br")]
    assert word_edges(bert.tokenizer, 120) is None
    # SentencePiece's form, and its single bytes
    pieces = ["</s>", "\u2581the", "the", "<0x0A>", ".\u2581"]
    model = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="the"))
    edges = word_edges(tf.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>"), 5)
    assert edges.begins.tolist() == [True, True, False, True, False]
    assert edges.ends.tolist() == [False, False, False, True, True]


def test_a_start_token_that_is_not_there_is_refused(tmp_path):
    model = load_text_model(str(texts.gpt2_folder(tmp_path / "m", bos=False)))
    assert read_document(model, "the fox", "text", causal=True).before == ()
    with pytest.raises(InputError, match="no start token"):
        read_document(model, "the fox", "text", causal=True, bos=True)


def test_a_rope_that_depends_on_the_length_is_told(tmp_path):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = tf.LlamaConfig(**{**tiny.DECODER, "max_position_embeddings": 32, "rope_parameters": dynamic})
    assert rope_warning(config, 32) is None
    assert "--context 32 --stride 16" in rope_warning(config, 33)
    assert rope_warning(tf.LlamaConfig(**tiny.DECODER), 10_000) is None
    assert rope_warning(tf.GPT2Config(), 10_000) is None
    # what the sentence says: later tokens change earlier predictions, not so at one length
    model = tf.LlamaForCausalLM(config).eval()
    ids = tiny.tokens(1, 60)
    with torch.no_grad():
        early, late = model(input_ids=ids[:, :30]).logits, model(input_ids=ids).logits[:, :30]
    assert float((early - late).abs().amax()) > 1e-2
