"""Our packed ESM-2 equals transformers' at every layer, whatever lies beside a protein in the batch."""

from __future__ import annotations

import pytest
import torch

from esm_peer import SIZES, esm, literal, protein, save
from longlens.errors import InputError
from longlens.models.encoder import Packed, attend_with
from longlens.models.pretrained import load


@pytest.fixture(scope="module", params=SIZES)
def pair(request, tmp_path_factory):
    theirs = esm(*SIZES[request.param])
    folder = save(theirs, tmp_path_factory.mktemp(request.param))
    return theirs, load(folder)


def close(ours, theirs):
    # relative to the layer's scale: hidden states before the last norm grow with depth
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


def check(theirs, ours, proteins, masked=()):
    packed = ours.pack(proteins)
    for row in masked:
        packed.tokens[row] = ours.alphabet.mask
    with torch.no_grad():
        encoded = ours(packed, keep=range(ours.config.layers + 1))
        logits = ours.logits(encoded.last)
    for start, stop in packed.cu_seqlens.unfold(0, 2, 1).tolist():
        states, expected = literal(theirs, packed.tokens[start:stop])
        assert len(states) == len(encoded.layers) == ours.config.layers + 1
        for layer, state in enumerate(states):
            close(encoded.layers[layer][start:stop], state)
        close(logits[start:stop], expected)


def test_every_layer_and_the_logits_of_a_mixed_batch(pair):
    check(*pair, [protein(length, length) for length in (1, 2, 63, 300)])


def test_masked_tokens_rescale_their_own_sequence_alone(pair):
    check(*pair, [protein(length, length) for length in (40, 25, 7)], masked=(3, 4, 30, 50))


def test_a_protein_of_three_thousand(pair):
    check(*pair, [protein(3000, 1)])


def test_the_batch_changes_nothing(pair):
    ours = pair[1]
    one, others = protein(200, 3), [protein(length, length) for length in (5, 600, 1)]
    with torch.no_grad():
        alone = ours(ours.pack([one])).last
        beside = ours(ours.pack([others[0], one, *others[1:]])).last[7:209]
    assert (alone - beside).abs().max() <= 1e-5


def test_frequencies_come_from_the_checkpoint(pair):
    frequencies = pair[1].encoder.rotary.frequencies
    assert torch.equal(frequencies, frequencies.half().float())
    assert pair[1].to(torch.bfloat16).encoder.rotary.frequencies.dtype == torch.float32
    pair[1].to(torch.float32)
    assert torch.equal(pair[1].encoder.rotary.frequencies, frequencies)


def test_gradients_equal_the_literal_ones_with_and_without_recomputing(tmp_path):
    theirs = esm(2, 32, 4)
    ours = load(save(theirs, tmp_path)).requires_grad_(True)
    packed = ours.pack([protein(30, 0)])
    one = packed.tokens.unsqueeze(0)
    theirs(one, attention_mask=torch.ones_like(one)).logits.square().mean().backward()
    expected = theirs.esm.encoder.layer[0].attention.self.key.weight.grad
    for recompute in (False, True):
        ours.encoder.recompute = recompute
        ours.zero_grad()
        ours.logits(ours(packed).last).square().mean().backward()
        torch.testing.assert_close(ours.encoder.layers[0].qkv.weight.grad[32:64], expected, rtol=1e-4, atol=1e-6)


def test_attention_is_an_argument(tmp_path):
    ours = load(save(esm(2, 32, 4), tmp_path))
    seen = []

    def attend(query, key, value, *, layer, scale, cu_seqlens):
        seen.append((layer, tuple(query.shape), scale, cu_seqlens.tolist()))
        return attend_with("window:4")(query, key, value, layer=layer, scale=scale, cu_seqlens=cu_seqlens)

    packed = ours.pack(["MKTAYIAKQR", "GAV"])
    with torch.no_grad():
        near = ours(packed, attend=attend).last
        assert torch.equal(near, ours(packed, attend=attend_with("window:4")).last)
        assert not torch.allclose(near, ours(packed).last)
    assert seen == [(layer, (1, 4, 17, 8), 8**-0.5, [0, 12, 17]) for layer in (0, 1)]


def test_wrong_tokens_are_named(tmp_path):
    ours = load(save(esm(1, 32, 4), tmp_path))
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    for packed, words in (
        (Packed(torch.tensor([0, 40, 2]), bounds), r"token numbers in 0\.\.32, got 0\.\.40"),
        (Packed(torch.tensor([0, 4, 5, 2]), bounds), r"ends at T = 4, got \[0, 3\]"),
        (Packed(torch.tensor([0.0, 4, 2]), bounds), "expected tokens .* of int64, got torch.float32"),
    ):
        with pytest.raises(InputError, match=words):
            ours(packed)
