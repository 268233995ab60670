"""What is seen of a watched transformers model is what its eager attention weights say; the model does not notice."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from test_attach import snapshot
from tiny_models import ALL, bert, eager, gemma2, llama, mistral, padding, run, t5, tokens

from longlens.errors import InputError, LensError, UnsupportedError
from longlens.hf import attach
from longlens.hf.arguments import AttentionArguments
from longlens.lens.collect.columns import Received
from longlens.lens.collect.maps import Cells
from longlens.lens.collect.rows import Entropy, LogSumExp, TopKeys
from longlens.watching import watch

COLLECT = (Entropy(), Received(), TopKeys(3), Cells(queries=(0, 7, 20), label="some"))


def weights_of(model, ids, mask):
    """Eager weights of each attention module, in the order of the modules."""
    given = {"output_attentions": True}
    if model.config.model_type == "t5":
        output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids, decoder_attention_mask=mask, **given)
        decoder = [w for pair in zip(output.decoder_attentions, output.cross_attentions, strict=True) for w in pair]
        return [*output.encoder_attentions, *decoder]
    return model(input_ids=ids, attention_mask=mask, **given).attentions


def compare(seen, weights, rows):
    """`rows` (B, N): queries that are no padding. Others are 0 or uniform, as transformers happens to fill them."""
    assert len(seen.layers) == len(weights)
    for layer, p in enumerate(weights):
        p = p.double()
        keep = rows[:, None].expand(p.shape[:3])
        entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
        torch.testing.assert_close(seen.entropy[layer].values.double()[keep], entropy[keep], rtol=1e-4, atol=2e-5)
        best = p.topk(3).values
        torch.testing.assert_close(seen.top_keys[layer].weight.double()[keep], best[keep], rtol=1e-4, atol=1e-5)
        some = [0, 7, 20]
        got, want = seen.some[layer].values.double(), p[:, :, some]
        torch.testing.assert_close(got[keep[:, :, some]], want[keep[:, :, some]], rtol=1e-4, atol=1e-5)
        if rows.all():
            torch.testing.assert_close(seen.received[layer].values.double(), p.sum(-2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", [name for name in ALL if name != "gpt_oss"])
def test_statistics_are_those_of_eager_weights(name, side):
    model, ids, mask = eager(ALL[name]), tokens(), padding(side)
    with torch.no_grad():
        weights, plain = weights_of(model, ids, mask), run(model, ids, mask)
        # transformers leaves hooks of its own once it was asked for weights
        before = snapshot(model)
        with watch(model, COLLECT) as seen:
            found = run(model, ids, mask)
    kept = mask.bool()
    torch.testing.assert_close(found[kept], plain[kept], rtol=1e-5, atol=2e-5)
    compare(seen, weights, kept)
    assert snapshot(model) == before


def test_sinks_keep_part_of_the_mass():
    model, ids = eager(ALL["gpt_oss"]), tokens()
    with torch.no_grad():
        weights = weights_of(model, ids, None)
        with watch(model, [Cells(queries=(0, 7, 20), label="some")]) as seen:
            run(model, ids)
    for layer, p in enumerate(weights):
        torch.testing.assert_close(seen.some[layer].values, p[:, :, [0, 7, 20]], rtol=1e-4, atol=1e-5)
        assert (seen.some[layer].values.sum(-1) < 0.999).any()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "t5"])
def test_each_step_of_a_generation_is_a_call(name, cache):
    model, ids, mask = eager(ALL[name]), tokens(length=11), padding("left", length=11)
    given = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "return_dict_in_generate": True}
    with torch.no_grad():
        plain = model.generate(ids, attention_mask=mask, output_attentions=True, **given)
        with watch(model, [Entropy()]) as seen:
            found = model.generate(ids, attention_mask=mask, **given)
    assert torch.equal(found.sequences, plain.sequences)
    steps = plain.decoder_attentions if name == "t5" else plain.attentions
    # T5 first encodes
    calls = seen.calls[1:] if name == "t5" else seen.calls
    assert len(calls) == len(steps) == 6
    for call, weights in zip(calls, steps, strict=True):
        layers = sorted(call)[::2] if name == "t5" else sorted(call)
        for layer, p in zip(layers, weights, strict=True):
            entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
            # the last query is a token of the text in every row
            torch.testing.assert_close(call[layer]["entropy"].values[..., -1], entropy[..., -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_sequences(batch):
    model, ids = eager(mistral), tokens(batch, 27)
    places = torch.cat([torch.arange(n) for n in (4, 13, 10)]).expand(batch, -1)
    collect = [Entropy(), Received()]
    with torch.no_grad():
        with watch(model, collect) as packed:
            model(ids, position_ids=places, use_cache=False)
        parts = []
        for piece in ids.split([4, 13, 10], 1):
            with watch(model, collect) as seen:
                model(piece, use_cache=False)
            parts.append(seen)
    for layer in (0, 1):
        for name in ("entropy", "received"):
            whole = torch.cat([getattr(part, name)[layer].values for part in parts], -1)
            torch.testing.assert_close(getattr(packed, name)[layer].values, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", ["longformer:2,global_tokens=(0,)", "lsh:1,bucket=2", "window:1|dilated:1,dilation=3"]
)
def test_methods_count_positions_within_each_packed_sequence(method):
    """What is seen of a batch that is packed is what ran: global tokens, hashes and strides begin anew in each one."""
    model, ids = eager(llama), tokens(2, 27)
    places = torch.cat([torch.arange(n) for n in (4, 13, 10)]).expand(2, -1)
    collect = [Entropy(), Cells(queries=(16, 26), label="some")]
    with torch.no_grad():
        with watch(model, collect, method=method) as packed:
            model(ids, position_ids=places, use_cache=False)
        for row in (0, 1):
            for start, stop in ((4, 17), (17, 27)):
                with watch(model, [Entropy()], method=method) as alone:
                    model(ids[row : row + 1, start:stop], use_cache=False)
                for layer in (0, 1):
                    got = packed.entropy[layer][row, :, start:stop]
                    torch.testing.assert_close(got, alone.entropy[layer][0], rtol=1e-4, atol=1e-5)
    assert not packed.some[0][:, :, 0, :4].any()
    assert packed.some[0][:, :, 0, 4:17].any()


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2", "gpt_oss", "t5"])
def test_some_layers_and_heads(name):
    model, ids, mask = eager(ALL[name]), tokens(), padding("left")
    with torch.no_grad():
        with watch(model, [Entropy()]) as every:
            run(model, ids, mask)
        with watch(model, [Entropy()], layers=[-1], heads=[3, 1]) as seen:
            run(model, ids, mask)
    last = len(every.layers) - 1
    assert seen.layers == (last,)
    torch.testing.assert_close(seen.entropy[last].values, every.entropy[last][:, [3, 1]])
    with pytest.raises(InputError, match="expected layers of"):
        watch(model, layers=[99]).__enter__()
    with watch(model, heads=[4]), pytest.raises(InputError, match=r"expected heads of 0\.\.3"):
        run(model, ids)


def test_the_model_is_what_it_was_after_an_exception():
    model, ids = eager(gemma2), tokens()
    before = snapshot(model)

    def fail():
        with watch(model, [Entropy()]):
            run(model, ids)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert snapshot(model) == before
    with watch(model, [Entropy()]) as seen:
        run(model, ids)
        with pytest.raises(ValueError, match="input_ids"):
            model(input_ids=None)
        # a call that failed leaves nothing, and does not disturb the next
        run(model, ids)
    assert len(seen.calls) == 2
    assert seen.layers == (0, 1)
    assert snapshot(model) == before


def test_weights_that_are_not_the_models_are_an_error_that_names_the_layer(monkeypatch):
    model, ids = eager(bert), tokens()
    attend, scale = AttentionArguments.attend, [1.0, 1.2]

    def wrong(call, method):
        return attend(call, method) * scale.pop(0)

    monkeypatch.setattr(AttentionArguments, "attend", wrong)
    with pytest.raises(LensError, match=r"layer 1 \(encoder.layer.1.attention.self\)"), watch(model, [Entropy()]):
        run(model, ids)


def test_an_attached_model_is_watched_as_attached():
    model, ids = eager(bert), tokens()
    collect = [Cells(queries=(10,), label="row")]
    with torch.no_grad(), attach(model, "window:2"):
        plain = run(model, ids)
        with watch(model, collect) as seen:
            assert torch.equal(run(model, ids), plain)
        assert torch.equal(run(model, ids), plain)
    row = seen.row[0][0, 0, 0]
    assert torch.equal(row.nonzero().flatten(), torch.arange(8, 13))
    with watch(model, collect, method="window:1") as seen:
        run(model, ids)
    assert (seen.row[1].values > 0).sum(-1).unique().tolist() == [3]
    with watch(model, collect, method="performer"), pytest.raises(UnsupportedError, match="no attention weights"):
        run(model, ids)


def test_watches_inside_one_another_all_see():
    model, ids = eager(bert), tokens()
    collect = [Cells(queries=(10,), label="row")]
    with torch.no_grad(), watch(model, [Entropy(), *collect]) as outer:
        with watch(model, [Received()]) as inner:
            run(model, ids)
        # attached after the watch began: what is seen is what ran
        with attach(model, "window:2"):
            run(model, ids)
        run(model, ids)
        with attach(model, "performer"), pytest.raises(UnsupportedError, match="no attention weights"):
            run(model, ids)
    assert len(inner.received) == 2
    assert [sorted(call) for call in outer.calls] == [[0, 1]] * 3
    exact, window, again = (call[0]["row"].values[0, 0, 0] for call in outer.calls)
    assert torch.equal(exact, again)
    assert (exact > 0).all()
    assert torch.equal(window.nonzero().flatten(), torch.arange(8, 13))


def test_training_with_dropout_and_recomputed_layers():
    model, ids = bert(attention_probs_dropout_prob=0.3), tokens()
    model.activation_checkpointing_enable()
    model.train()
    with watch(model, [LogSumExp()]) as seen:
        run(model, ids).sum().backward()
    assert seen.layers == (0, 1)
    assert len(seen.calls) == 1
    assert seen.log_sum_exp[0].values.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_layers_that_share_their_weights_are_refused():
    shared = {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    model = tf.AlbertModel(tf.AlbertConfig(vocab_size=40, num_hidden_layers=2, **shared)).eval()
    with torch.no_grad(), watch(model, [Entropy()]), pytest.raises(UnsupportedError, match="ALBERT"):
        run(model, tokens())
    with torch.no_grad():
        ids = tokens()
        plain = run(model, ids)
        with attach(model):
            torch.testing.assert_close(run(model, ids), plain, rtol=1e-5, atol=1e-5)


def test_an_attention_that_attends_in_parts_is_watched_as_packed_sequences():
    """Qwen2.5-VL cuts an image's tokens at its windows and attends to each: together they are one layer."""
    given = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    config = tf.AutoConfig.for_model("qwen2_5_vl").vision_config.__class__(
        **given, patch_size=4, spatial_merge_size=2, window_size=16, fullatt_block_indexes=[1], initializer_range=0.3
    )
    model = tf.AutoModel.from_config(config).eval()
    grid = torch.tensor([[1, 8, 12], [1, 4, 4]])
    pixels = torch.randn(8 * 12 + 4 * 4, 3 * 2 * 4 * 4)
    weights = []

    def eager_weights(module, query, key, value, attention_mask=None, scaling=None, **more):
        weights.append(torch.softmax(query.double() @ key.double().transpose(2, 3) * scaling, -1))
        return (weights[-1].to(value.dtype) @ value).transpose(1, 2), None

    tf.AttentionInterface.register("eager_weights", eager_weights)
    try:
        with torch.no_grad():
            model.set_attn_implementation("eager_weights")
            plain = model(pixels, grid_thw=grid).last_hidden_state
            with watch(model, [Entropy(), Received()]) as seen:
                found = model(pixels, grid_thw=grid).last_hidden_state
    finally:
        tf.AttentionInterface._global_mapping.pop("eager_weights")
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    # seven windows in the first layer, two images in the second
    assert len(weights) == 7 + 2
    for layer, parts in enumerate((weights[:7], weights[7:])):
        entropy = torch.cat([-(p * p.clamp(min=1e-300).log()).sum(-1) for p in parts], -1)
        torch.testing.assert_close(seen.entropy[layer].values.double(), entropy, rtol=1e-4, atol=1e-4)
        received = torch.cat([p.sum(-2) for p in parts], -1)
        torch.testing.assert_close(seen.received[layer].values.double(), received, rtol=1e-4, atol=1e-4)


def test_names_and_tables():
    model, ids = eager(t5), tokens()
    with torch.no_grad(), watch(model, [Entropy()]) as seen:
        run(model, ids)
    assert seen.names[0] == "encoder.block.0.layer.0.SelfAttention"
    assert seen.names[3] == "decoder.block.0.layer.1.EncDecAttention"
    table = seen.entropy.columns()
    assert list(table) == ["layer", "batch", "head", "query", "entropy"]
    assert len(table["layer"]) == 6 * 2 * 4 * 21
    here = (table["layer"] == 4) & (table["batch"] == 1) & (table["head"] == 2) & (table["query"] == 5)
    assert table["entropy"][here].item() == pytest.approx(seen.entropy[4][1, 2, 5].item())


def test_models_that_cannot_be_attached_cannot_be_watched():
    given = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tf.DebertaV2Model(tf.DebertaV2Config(intermediate_size=16, **given))
    with pytest.raises(UnsupportedError, match="DebertaV2Model"):
        watch(model).__enter__()
    with pytest.raises(InputError, match="got Linear"):
        watch(torch.nn.Linear(2, 2))


def test_what_is_seen_does_not_keep_the_graph():
    model, ids = eager(llama), tokens()
    with watch(model, [Entropy()]) as seen:
        run(model, ids)
    assert not seen.entropy[0].values.requires_grad
