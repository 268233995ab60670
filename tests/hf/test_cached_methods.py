"""A text in pieces with a cache gives what the whole text gives, by every method that has a causal form."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tiny_models import eager, gpt2, llama, mistral, padding, tokens

from longlens.errors import UnsupportedError
from longlens.hf import attach

METHODS = (
    "window:3", "dilated:1,dilation=3", "longformer:2,global_tokens=(0,)", "strided:4", "lsh:2,bucket=4",
    "random:1,block=4", "bigbird:4", "window:2|lsh:2,bucket=2", "linear", "performer", "scatterbrain",
)  # fmt: skip


def in_pieces(model, ids, mask, pieces):
    cache, parts, at = tf.DynamicCache(config=model.config), [], 0
    for piece in ids.split(pieces, 1):
        at += piece.shape[1]
        parts.append(model(piece, past_key_values=cache, use_cache=True, attention_mask=mask[:, :at]).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("pieces", [[13, *[1] * 12], [9, 1, 8, 7]])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("method", METHODS)
def test_pieces_are_the_whole(method, side, pieces):
    model, ids, mask = eager(llama), tokens(length=25), padding(side, length=25)
    with torch.no_grad(), attach(model, method):
        whole = model(ids, attention_mask=mask).logits
        found = in_pieces(model, ids, mask, pieces)
    kept = mask.bool()
    torch.testing.assert_close(found[kept], whole[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_generation_by_hashing_is_the_same_without_a_cache(build):
    model, ids = eager(build), tokens(length=11)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
    with attach(model, "lsh:2,bucket=4"):
        cached = model.generate(ids, use_cache=True, **given)
        plain = model.generate(ids, use_cache=False, **given)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("method", ["longformer:2,global_tokens=(0,)", "random:1,block=4", "lsh:2,bucket=4"])
def test_methods_that_need_the_beginning_are_refused_where_a_window_dropped_it(method):
    model, ids = eager(mistral), tokens(length=25)
    mask = torch.ones_like(ids)
    with (
        torch.no_grad(),
        attach(model, method),
        pytest.raises(UnsupportedError, match="needs the beginning"),
    ):
        in_pieces(model, ids, mask, [5, *[1] * 20])
    for served in ("exact", "window:3", "dilated:1,dilation=3"):
        with torch.no_grad(), attach(model, served):
            whole = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(in_pieces(model, ids, mask, [9, *[1] * 16]), whole, rtol=1e-4, atol=1e-4)
