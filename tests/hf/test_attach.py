"""A transformers model computes the same attached as alone, whatever its masks and caches; then it is what it was."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from tiny_models import ALL, DECODERS, bert, eager, gemma2, llama, mistral, padding, run, t5, tokens
from transformers import AttentionInterface, AttentionMaskInterface

import longlens
from longlens.errors import InputError, MaskError, UnsupportedError
from longlens.hf import attach
from test_imports import modules_after

CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def both(model, *args, **given):
    with torch.no_grad():
        expected = run(model, *args, **given)
        with attach(model):
            return run(model, *args, **given), expected


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_outputs_are_those_of_eager_attention_under_padding(name, side):
    model, ids, mask = eager(ALL[name]), tokens(), padding(side)
    found, expected = both(model, ids, mask)
    kept = mask.bool()
    assert expected[kept].std() > 0.1
    torch.testing.assert_close(found[kept], expected[kept], **CLOSE)
    if side == "left" or (side == "right" and name not in DECODERS):
        # and the padding matters: a model that had lost its mask would not pass
        with torch.no_grad():
            blind = run(model, ids)
        assert (blind[kept] - expected[kept]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "esm", "llama", "mistral", "t5"])
def test_outputs_are_those_of_sdpa(name):
    model, ids, mask = ALL[name]().eval(), tokens(), padding("left")
    assert model.config._attn_implementation == "sdpa"
    found, expected = both(model, ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "mistral", "gemma2", "gpt_oss", "t5"])
def test_gradients_are_those_of_eager_attention(name, side):
    model, ids, mask = eager(ALL[name]), tokens(), padding(side)
    for dropped in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropped.p = 0.0
    model.train()
    gradients = []
    for attached in (False, True):
        model.zero_grad()
        handle = attach(model) if attached else None
        (run(model, ids, mask)[mask.bool()] ** 2).mean().backward()
        if handle is not None:
            handle.detach()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for key in expected:
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4 * scale + 1e-6, msg=key)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_generation_gives_the_same_tokens(name, cache):
    model, ids = eager(ALL[name]), tokens(length=11)
    mask = padding("left", length=11)

    def generate():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=14, do_sample=False, cache_implementation=cache,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip

    expected = generate()
    with attach(model):
        found = generate()
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_text_in_pieces_with_a_cache_is_the_whole_text(name):
    model, ids = eager(DECODERS[name]), tokens(length=30)
    with torch.no_grad():
        whole = model(ids).logits
        with attach(model):
            cache = tf.DynamicCache(config=model.config)
            parts = [
                model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([13, 1, 9, 7], 1)
            ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@pytest.mark.parametrize("batch", [1, 2])
# GPT-OSS in transformers hands no positions to its masks: it is packed by boundaries alone
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_positions_that_restart_separate_sequences(name, batch):
    model = eager(DECODERS[name])
    ids = tokens(batch, 27)
    places = torch.cat([torch.arange(n) for n in (4, 13, 10)]).expand(batch, -1)
    with torch.no_grad(), attach(model):
        packed = model(ids, position_ids=places, use_cache=False).logits
    with torch.no_grad():
        alone = torch.cat([model(piece, use_cache=False).logits for piece in ids.split([4, 13, 10], 1)], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_of_a_batch_that_are_packed_differently(name):
    model, ids = eager(DECODERS[name]), tokens(3, 20)
    whole, halves = torch.arange(20), torch.cat([torch.arange(12), torch.arange(8)])
    places = torch.stack([whole, whole, halves])
    with torch.no_grad():
        expected = model(ids, position_ids=places, use_cache=False).logits
        with attach(model):
            found = model(ids, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "gpt_oss"])
def test_boundaries_given_to_the_model_separate_sequences(name):
    model, ids = eager(ALL[name]), tokens(1, 27)
    bounds = torch.tensor([0, 4, 17, 27], dtype=torch.int32)
    places = torch.cat([torch.arange(n) for n in (4, 13, 10)]).unsqueeze(0)
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 13, "max_length_k": 13}
    with torch.no_grad(), attach(model):
        packed = run(model, ids, position_ids=places, **given, use_cache=False)
        with pytest.raises(UnsupportedError, match="batch size 1"):
            run(model, ids.expand(2, -1), position_ids=places.expand(2, -1), **given, use_cache=False)
        if name == "llama":
            with pytest.raises(MaskError, match="name different sequences"):
                run(model, ids, position_ids=places, use_cache=False, **(given | dict.fromkeys(
                    ("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 5, 17, 27], dtype=torch.int32))))  # fmt: skip
    with torch.no_grad():
        alone = torch.cat([run(model, piece) for piece in ids.split([4, 13, 10], 1)], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)


def test_a_mask_of_four_axes_given_by_the_user_is_used():
    model, ids = eager(llama), tokens()
    keep = (torch.rand(2, 1, 21, 21) > 0.4) | torch.eye(21, dtype=torch.bool)
    added = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(ids, attention_mask=added).logits
        with attach(model):
            found = model(ids, attention_mask=added).logits, model(ids, attention_mask=keep).logits
    for one in found:
        torch.testing.assert_close(one, expected, **CLOSE)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_another_method_is_that_method(name):
    model, ids = eager(ALL[name]), tokens()
    near = (torch.arange(21).unsqueeze(0) - torch.arange(21).unsqueeze(1)).abs() <= 4
    added = torch.zeros(1, 1, 21, 21).masked_fill(~near, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = run(model, ids, added)
        with attach(model, "window:4"):
            found = run(model, ids)
        with attach(model, longlens.Performer(features=64)):
            other = run(model, ids)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert other.isfinite().all()
    assert (other - expected).abs().max() > 1e-3


def test_a_method_within_a_model_that_has_windows_and_caps_of_its_own():
    model, ids, mask = eager(gemma2), tokens(), padding("left")
    i, j = torch.arange(21).unsqueeze(1), torch.arange(21).unsqueeze(0)
    with torch.no_grad():
        with attach(model, "window:3"):
            found = model(ids, attention_mask=mask).logits
        # the model's window of 8 holds these pairs in every layer
        keep = ((j <= i) & (j >= i - 3)) & mask.bool()[:, None, None, :]
        added = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
        expected = model(ids, attention_mask={"full_attention": added, "sliding_attention": added}).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)
    with attach(model, "performer"), pytest.raises(UnsupportedError, match="no scores to cap"):
        model(ids)
    with attach(eager_mistral := eager(mistral), "performer"), pytest.raises(UnsupportedError, match="attn_mask"):
        eager_mistral(ids)


def test_dropout_keeps_the_mean_and_is_off_outside_training():
    model = bert(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0, num_hidden_layers=1).eval()
    attention = model.encoder.layer[0].attention.self
    x, mask = torch.randn(1, 12, 32), None
    with torch.no_grad(), attach(model):
        still = attention(x, mask)[0]
        torch.testing.assert_close(attention(x, mask)[0], still)
        model.train()
        runs = torch.stack([attention(x, mask)[0] for _ in range(1500)])
    error = (runs.mean(0) - still).abs()
    # standard error of the mean of 1500 runs
    assert (error < 5 * runs.std(0) / 1500**0.5 + 1e-6).all()
    assert runs.std(0).mean() > 0.01


def snapshot(model):
    configs = [copy.deepcopy(vars(m.config)) for m in model.modules() if hasattr(m, "config")]
    hooks = [
        {k: dict(v) for k, v in vars(m).items() if k.endswith(("hooks", "kwargs", "called"))} for m in model.modules()
    ]
    names = sorted(AttentionInterface._global_mapping), sorted(AttentionMaskInterface._global_mapping)
    return configs, hooks, names, [id(m.forward) and type(m) for m in model.modules()], sorted(vars(model))


@pytest.mark.parametrize("name", ["bert", "gemma2", "t5"])
def test_the_model_is_afterwards_what_it_was(name):
    model, ids = ALL[name]().eval(), tokens()
    before = snapshot(model)
    with attach(model):
        assert snapshot(model) != before
        run(model, ids)
    assert snapshot(model) == before

    def fail():
        with attach(model):
            run(model, ids)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert snapshot(model) == before
    handle = attach(model, "window:4")
    handle.detach()
    handle.detach()
    assert snapshot(model) == before


def test_attachments_are_undone_from_the_last_to_the_first():
    model, ids = eager(bert), tokens()
    with torch.no_grad():
        plain = run(model, ids)
        with attach(model, "window:2") as outer:
            near = run(model, ids)
            with attach(model):
                torch.testing.assert_close(run(model, ids), plain, **CLOSE)
                with pytest.raises(InputError, match="last attachment"):
                    outer.detach()
            assert torch.equal(run(model, ids), near)
        assert torch.equal(run(model, ids), plain)


def test_two_models_of_one_class_run_on_different_methods():
    one, other, ids = eager(bert), eager(bert), tokens()
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        plain = run(one, ids)
        with attach(one, "window:2"):
            assert (run(one, ids) - plain).abs().max() > 1e-3
            assert torch.equal(run(other, ids), plain)


def test_a_model_that_shares_its_configuration_is_not_switched_unseen():
    one = eager(bert)
    other = tf.BertModel(one.config).eval()
    with attach(one, "window:2"):
        run(one, tokens())
        with pytest.raises(UnsupportedError, match="expected a part of the attached BertModel"):
            run(other, tokens())
    run(other, tokens())


def test_weights_are_refused_rather_than_an_empty_tuple():
    model, ids = eager(bert), tokens()
    with attach(model):
        with pytest.raises(UnsupportedError, match=r"BertModel.*longlens.watch"):
            model(ids, output_attentions=True)
        run(model, ids)
    model.config.output_attentions = True
    with pytest.raises(UnsupportedError, match="output_attentions"):
        attach(model)
    with pytest.raises(UnsupportedError, match="output_attentions"), attach(decoder := eager(llama)):
        decoder.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


LONGFORMER = {"attention_window": 4, "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (tf.LongformerModel, tf.LongformerConfig(**LONGFORMER, num_attention_heads=2, intermediate_size=16)),
        (tf.BigBirdModel, tf.BigBirdConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
        (tf.DebertaV2Model, tf.DebertaV2Config(vocab_size=20, hidden_size=16, num_hidden_layers=1,
                                               num_attention_heads=2, intermediate_size=16)),
    ],
)  # fmt: skip
def test_models_with_attention_of_their_own_are_refused_by_name(kind, config):
    model = kind(config)
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=f"{kind.__name__}: its attention does not use"):
        attach(model)
    assert snapshot(model) == before


def test_transformers_is_not_imported_before_a_model_is_attached():
    found = modules_after("import longlens.hf, longlens.watching")
    assert "torch" in found
    assert "transformers" not in found


def test_other_things_are_refused():
    with pytest.raises(InputError, match="expected a transformers model, got Linear"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="unknown method"):
        attach(eager(bert), "nothing")


def test_what_attention_is_handed_and_cannot_be_served_is_refused_by_name():
    model = eager(llama)
    module, x = model.model.layers[0].self_attn, torch.randn(1, 4, 5, 8)
    with attach(model):
        function = AttentionInterface._global_mapping[model.config._attn_implementation]
        for given, said in (
            ({"cache": object()}, "paged"), ({"head_mask": x}, "head_mask"), ({"output_attentions": True}, "N x N")
        ):  # fmt: skip
            with pytest.raises(UnsupportedError, match=f"LlamaAttention.*{said}"):
                function(module, x, x, x, None, **given)
        with pytest.raises(UnsupportedError, match="four axes"):
            function(module, x, x, x, torch.ones(1, 5, dtype=torch.bool))
        # the layout that transformers wants back
        out, weights = function(module, x, x[:, :2], x[:, :2], None, scaling=0.3)
    assert out.shape == (1, 5, 4, 8)
    assert out.is_contiguous()
    assert weights is None
    expected = longlens.attention(x, x[:, :2], x[:, :2], is_causal=True, scale=0.3)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_a_compiled_model_gives_the_same():
    model, ids, mask = eager(llama), tokens(), padding("left")
    with torch.no_grad(), attach(model):
        expected = model(ids, attention_mask=mask).logits
        found = torch.compile(model, backend="eager")(ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, **CLOSE)


def test_half_precision_and_layers_recomputed_in_the_backward_pass():
    model, ids, mask = mistral().to(torch.bfloat16).train(), tokens(), padding("left")
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable()
        model.zero_grad()
        with attach(model):
            model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain)


def test_t5_with_the_encoder_padded_and_the_decoder_short():
    model, ids, mask = eager(t5), tokens(length=19), padding("right", length=19)
    short = tokens(length=5)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, decoder_input_ids=short).logits
        with attach(model):
            found = model(input_ids=ids, attention_mask=mask, decoder_input_ids=short).logits
    torch.testing.assert_close(found, expected, **CLOSE)
