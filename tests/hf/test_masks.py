"""What a carrier says in our terms lets exactly those pairs attend that transformers' own dense mask does."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from transformers import masking_utils as mu

from longlens.errors import MaskError, UnsupportedError
from longlens.hf.masks import DeferredMask
from longlens.ops.inputs import check_inputs
from longlens.ops.masks import Predicate
from longlens.ops.reference import allowed_pairs

BATCH = 2


def dense(carrier):
    """transformers' mask (B, 1, Nq, Nk) of the same call."""
    batch, _, queries, keys = carrier.shape
    return mu.sdpa_mask(
        batch_size=batch, q_length=queries, kv_length=keys, q_offset=carrier.q_offset, kv_offset=carrier.kv_offset,
        mask_function=carrier.closure, attention_mask=carrier.key_mask, use_vmap=carrier.vmapped,
        allow_is_causal_skip=False,
    )  # fmt: skip


def ours(carrier):
    """(B, 1, Nq, Nk) bool of the plan; keys that it leaves out are False."""
    batch, _, queries, keys = carrier.shape
    plan = carrier.plan
    count = plan.keys.stop - plan.keys.start
    query, key = torch.zeros(batch, 1, queries, 4), torch.zeros(batch, 1, count, 4)
    inputs = check_inputs(query, key, key, plan.rule, 0.0, plan.causal, None, plan.key_mask, None, None, False)
    found = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    kept = allowed_pairs(inputs)
    if plan.documents is not None:
        ids = plan.documents
        kept = kept & (ids[:, None, :, None] == ids[:, None, None, :])
    found[..., plan.keys] = kept
    return found


def check(carrier):
    expected = dense(carrier).expand(carrier.shape)
    assert 0 < expected.sum() <= expected.numel()
    assert torch.equal(ours(carrier), expected)
    return carrier.plan


def carry(closure, queries=13, keys=13, *, q_offset=0, kv_offset=0, mask=None, vmapped=False):
    return DeferredMask(
        batch_size=BATCH, q_length=queries, kv_length=keys, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=closure, attention_mask=mask, use_vmap=vmapped, dtype=torch.float32, config=None,
        allow_is_causal_skip=True,
    )  # fmt: skip


def padded(side, length):
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    if side == "left":
        mask[0, :4] = False
    elif side == "right":
        mask[0, -2:] = False
    return mask


CLOSURES = {
    "causal": mu.causal_mask_function,
    "both": mu.bidirectional_mask_function,
    "window": mu.sliding_window_causal_mask_function(5),
    "wide window": mu.sliding_window_causal_mask_function(50),
    "near": mu.sliding_window_bidirectional_mask_function(3),
    "all near": mu.sliding_window_bidirectional_mask_function(50),
    "chunks": mu.chunked_causal_mask_function(4, torch.tensor([4, 0])),
}
READ = ("causal", "both", "window", "wide window", "near", "all near")
# queries, keys, offset of the first query and of the first key: whole text, one token and a piece after a cache, keys
# of a static cache that are not written yet, and a cache that let the oldest keys go
PLACES = {
    "whole": (13, 13, 0, 0), "step": (1, 13, 12, 0), "piece": (4, 13, 9, 0), "static": (4, 13, 3, 0),
    "static step": (1, 13, 7, 0), "moved on": (3, 7, 14, 10),
}  # fmt: skip


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CLOSURES)
def test_every_pair(name, place, side):
    queries, keys, q_offset, kv_offset = PLACES[place]
    mask = None if side == "none" else padded(side, q_offset + queries)
    plan = check(carry(CLOSURES[name], queries, keys, q_offset=q_offset, kv_offset=kv_offset, mask=mask))
    if name in READ and place in ("whole", "step", "piece"):
        # understood, and so skipped rather than asked pair by pair
        assert not plan.closure
        assert not isinstance(plan.rule, Predicate)
    if name == "chunks":
        assert plan.closure


def test_one_token_at_the_end_of_a_window_reads_no_more_keys_than_the_window_holds():
    plan = check(carry(CLOSURES["window"], 1, 13, q_offset=12))
    assert plan.keys == slice(8, 13)
    assert (plan.rule, plan.causal, plan.key_mask) == (None, True, None)


def test_a_window_wider_than_the_text_is_no_rule():
    for name in ("wide window", "all near"):
        assert check(carry(CLOSURES[name])).rule is None


@pytest.mark.parametrize("name", ["causal", "window"])
def test_packed_sequences(name):
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]])
    sequences = mu.find_packed_sequence_indices(places)
    plan = check(carry(mu.packed_sequence_compatibility_function(CLOSURES[name], places, sequences)))
    assert torch.equal(plan.documents, sequences)
    assert not plan.closure


def test_packed_sequences_of_chunks_stay_a_closure():
    places = torch.tensor([[*range(5), *range(8)], [*range(5), *range(8)]])
    closure = mu.packed_sequence_compatibility_function(
        CLOSURES["chunks"], places, mu.find_packed_sequence_indices(places)
    )
    plan = check(carry(closure))
    assert plan.documents is None
    assert plan.closure


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("vmapped", [False, True])
def test_a_models_own_mask_function(vmapped, side):
    groups = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1, 2, 2, 2, 2, -1], [-1] * 6 + [0] * 7])
    mask = None if side == "none" else padded(side, 13)
    prefix = torch.tensor([5, 2])
    closures = [
        mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(groups)),
        mu.or_masks(mu.causal_mask_function, lambda b, h, q, k: k < prefix[b]),
        mu.and_masks(mu.causal_mask_function, lambda b, h, q, k: (q + k) % 3 != 1),
        lambda b, h, q, k: (q - k) % 2 == 0,
        # an overlay without the causal half of its window
        mu.sliding_window_overlay(4),
    ]
    for closure in closures:
        assert check(carry(closure, mask=mask, vmapped=vmapped)).closure


def test_a_function_that_bears_a_known_name_elsewhere_is_not_taken_for_it():
    def causal_mask_function(b, h, q, k):
        return k >= q

    assert check(carry(causal_mask_function)).closure


def test_the_counter_of_a_static_cache_is_read_when_the_mask_is_made():
    counter = torch.tensor(3)
    carrier = carry(mu.causal_mask_function, 4, 13, q_offset=counter)
    counter.add_(4)
    assert carrier.q_offset == 3
    assert carrier.plan.keys == slice(0, 7)


def test_a_carrier_holds_no_more_than_a_key_mask():
    mask = padded("left", 13)
    carrier = carry(mu.causal_mask_function, mask=mask)
    held = [value for value in vars(carrier).values() if isinstance(value, torch.Tensor)]
    assert [tensor.numel() for tensor in held] == [mask.numel()]
    assert carrier.shape == (2, 1, 13, 13)
    assert carrier.ndim == 4
    assert carrier.contiguous() is carrier.to("cpu") is carrier
    assert "q_offset=0" in repr(carrier)


def test_a_model_that_computes_with_its_mask_is_refused():
    carrier, x = carry(mu.causal_mask_function), torch.zeros(2, 1, 13, 13)
    for use in (
        lambda: carrier[:, :, :, :4], lambda: x + carrier, lambda: torch.where(carrier, x, x), lambda: carrier.sum(),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="computes with its attention mask itself"):
            use()
    assert not hasattr(carrier, "_hidden")
    with pytest.raises(MaskError, match="bool key mask"):
        carry(mu.causal_mask_function, mask=torch.ones(2, 13))


@pytest.mark.parametrize("kind", ["causal", "window", "both", "near", "chunks"])
def test_transformers_own_makers_of_masks(kind):
    """The same from the functions that models call, as long as transformers names its closures as it does now."""
    config = tf.LlamaConfig(hidden_size=8, num_attention_heads=2)
    config.sliding_window, config.attention_chunk_size = 5, 4
    make = {
        "causal": mu.create_causal_mask, "window": mu.create_sliding_window_causal_mask,
        "both": mu.create_bidirectional_mask, "near": mu.create_bidirectional_sliding_window_mask,
        "chunks": mu.create_chunked_causal_mask,
    }[kind]  # fmt: skip
    tf.AttentionMaskInterface.register("carried", lambda **given: DeferredMask(**given))
    try:
        config._attn_implementation = "carried"
        for mask in (None, padded("left", 13), padded("right", 13)):
            carrier = make(config, torch.zeros(2, 13, 8), mask, past_key_values=None)
            assert check(carrier).closure == (kind == "chunks")
            # a mask that was made before is passed on as it is
            assert make(config, torch.zeros(2, 13, 8), carrier, past_key_values=None) is carrier
    finally:
        tf.AttentionMaskInterface._global_mapping.pop("carried")
