"""Contact maps equal transformers' `predict_contacts`, in the whole form and in the kept one, in far less memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest
import torch

import longlens
from esm_peer import SIZES, esm, protein, save
from live_tensors import LiveTensors
from longlens.errors import InputError, UnsupportedError
from longlens.lens import contacts
from longlens.lens.contacts import ContactObserver, KeptMap, WholeMap
from longlens.models.pretrained import load
from longlens.ops.observe import ForwardObserver, Observer
from longlens.testing import peak_growths

# layers, width, heads: ESM-2's
ARCHITECTURES = {"8M": SIZES["8M"], "150M": (30, 640, 20)}


def peer(layers, width, heads):
    """transformers' model with attention that is not flat, and a contact head of random values."""
    theirs = esm(layers, width, heads)
    for layer in theirs.esm.encoder.layer:
        for part in (layer.attention.self.query, layer.attention.self.key):
            part.weight.data.normal_(0, 2 / width**0.5)
    head = theirs.esm.contact_head.regression
    head.weight.data.normal_(0, 0.7)
    # some channels are not used, as in the trained ones
    head.weight.data[:, ::3] = 0
    head.bias.data.fill_(-0.7)
    theirs.set_attn_implementation("eager")
    return theirs


def reference(theirs, tokens):
    one = tokens.unsqueeze(0)
    with torch.no_grad():
        return theirs.predict_contacts(one, torch.ones_like(one))[0]


def kept(ours, packed):
    """The maps of the form that keeps queries and keys, whole."""
    maps = [KeptMap(int(stop - start) - 2, ours.contact_regression()) for start, stop in pairwise(packed.cu_seqlens)]
    with torch.no_grad():
        ours(packed, observers=[ContactObserver(maps)])
    found = []
    for contact_map in maps:
        whole = torch.zeros(contact_map.residues, contact_map.residues)
        for rows in contact_map.rows():
            last = rows.first + len(rows.probabilities)
            whole[rows.first : last, rows.first :] = rows.probabilities
            whole[rows.first :, rows.first : last] = rows.probabilities.T
        found.append(whole)
    return found


@pytest.mark.parametrize(("size", "lengths"), [("8M", (1, 2, 7, 63, 300, 701)), ("150M", (5, 130, 260))])
def test_both_forms_equal_transformers(size, lengths, tmp_path):
    theirs = peer(*ARCHITECTURES[size])
    ours = load(save(theirs, tmp_path))
    packed = ours.pack([protein(length, length) for length in lengths])
    spread = []
    for (start, stop), whole, rows in zip(
        pairwise(packed.cu_seqlens.tolist()), ours.predict_contacts(packed), kept(ours, packed), strict=True
    ):
        expected = reference(theirs, packed.tokens[start:stop])
        assert whole.shape == expected.shape
        assert (whole - expected).abs().max() <= 1e-5
        assert (rows - expected).abs().max() <= 1e-5
        spread.append(float(expected.std())) if len(expected) > 2 else None
    # the maps say something
    assert min(spread) > 1e-3, spread


def test_tiles_of_any_size_give_the_same(tmp_path, monkeypatch):
    ours = load(save(peer(3, 64, 4), tmp_path))
    packed = ours.pack([protein(150, 1)])
    expected = ours.predict_contacts(packed)[0]
    for name, value in (("ROWS", 32), ("STRETCH", 48), ("WEIGHTS", 64)):
        monkeypatch.setattr(contacts, name, value)
    torch.testing.assert_close(kept(ours, packed)[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.predict_contacts(packed)[0], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(expected, expected.T)


class Kept(Observer):
    """The attention calls of a forward pass, in float64."""

    needs_lse = True

    def __init__(self):
        self.layers = []

    def begin(self):
        forward = ForwardObserver()
        forward.attended = lambda call: self.layers.append((call.query[0].double(), call.key[0].double()))
        return forward


def test_bfloat16_maps_are_those_of_their_own_queries_and_keys(tmp_path, monkeypatch):
    """The log-sum-exp comes with the attention, without a second pass, and is as accurate as the weights need."""
    ours = load(save(peer(2, 64, 4), tmp_path), dtype="bfloat16")
    packed, calls = ours.pack([protein(200, 2)]), Kept()
    monkeypatch.setattr(contacts, "attention", None)
    contact_map = WholeMap(200, ours.contact_regression(), ours.device)
    with torch.no_grad():
        ours(packed, observers=[calls, ContactObserver([contact_map])])
    logits = torch.full((200, 200), ours.contact_regression().bias, dtype=torch.float64)
    for weight, (query, key) in zip(ours.contact_regression().weight.double(), calls.layers, strict=True):
        both = (query @ key.mT * 16**-0.5).softmax(-1)[:, 1:-1, 1:-1]
        both = both + both.mT
        product = both.sum(2, keepdim=True) * both.sum(1, keepdim=True) / both.sum((1, 2), keepdim=True)
        logits += torch.tensordot(weight, both - product, 1)
    found = contact_map.finish()
    assert found.dtype == torch.float32
    assert (found - logits.sigmoid()).abs().max() <= 1e-4


def test_transformers_model_gets_its_contacts(tmp_path):
    theirs = peer(3, 64, 4)
    save(theirs, tmp_path)
    tokens = load(tmp_path).pack([protein(40, 1), protein(25, 2)])
    first, second = tokens.tokens[:42], tokens.tokens[42:]
    ids = torch.ones(2, 42, dtype=torch.long)
    ids[0], ids[1, :27] = first, second
    keep = torch.arange(42) < torch.tensor([[42], [27]])
    found = longlens.hf.predict_contacts(theirs, ids, keep.long())
    for row, own in zip(found, (first, second), strict=True):
        assert (row - reference(theirs, own)).abs().max() <= 1e-5
    # its own batch, cut to the residues
    batch = theirs.predict_contacts(ids, keep.long())
    assert (found[1] - batch[1, :25, :25]).abs().max() <= 1e-5
    assert (longlens.hf.predict_contacts(theirs.esm, ids, keep)[1] - found[1]).abs().max() == 0
    assert theirs.config._attn_implementation == "eager"
    with pytest.raises(InputError, match="on the right"):
        longlens.hf.predict_contacts(theirs, ids, keep.flip(1).long())


def test_passes_of_other_threads_do_not_reach_the_maps(tmp_path):
    ours = load(save(peer(2, 64, 4), tmp_path))
    packed, other = ours.pack([protein(30, 1)]), ours.pack([protein(20, 2)])
    expected = ours.predict_contacts(packed)[0]
    contact_map = WholeMap(30, ours.contact_regression(), ours.device)
    with torch.no_grad(), ours.observed(ContactObserver([contact_map])):
        ours(packed)
        thread = Thread(target=lambda: ours(other))
        thread.start()
        thread.join()
    assert torch.equal(contact_map.finish(), expected)


def test_a_model_without_a_head_says_what_to_do():
    with pytest.raises(InputError, match=r"tiny has no contact head.*contacts fit"):
        load("tiny").predict_contacts(["MKT"])


@pytest.mark.memory
def test_the_kept_form_is_linear():
    here = str(Path(__file__).parent)
    cases = [{"residues": residues, "kept": True} for residues in (4096, 8192)]
    cases += [{"residues": 8192, "kept": False}]
    small, large, whole = peak_growths(
        "contact_pass:contact_pass", cases, path=[here], warm_up={"residues": 64, "kept": True}, runs=1
    )
    assert large <= 2.1 * small
    # the map itself, and little more
    assert 4 * 8192**2 <= whole <= 1.3 * 4 * 8192**2


def test_another_method_is_refused_and_predictions_are_exact_inside_a_watch(tmp_path):
    import longlens
    from longlens.lens import Entropy

    ours = load(save(peer(2, 64, 4), tmp_path))
    packed = ours.pack([protein(60, 1)])
    (want,) = ours.predict_contacts(packed)
    with longlens.watch(ours, [Entropy()], method="window:2"):
        torch.testing.assert_close(ours.predict_contacts(packed)[0], want)
        with pytest.raises(UnsupportedError, match="exact attention over all tokens, got window:2"):
            ours(packed, observers=[ContactObserver([WholeMap(60, ours.contact_regression(), ours.device)])])


def test_blocks_of_a_gpu_take_few_launches(tmp_path, monkeypatch):
    """A layer in one tile: the operators of a layer are a few dozen, and do not grow with the length."""
    ours = load(save(peer(3, 64, 4), tmp_path))
    expected = ours.predict_contacts([protein(300, 1)])[0]
    monkeypatch.setattr(contacts, "ROWS", contacts.MANY_ROWS)
    monkeypatch.setattr(contacts, "WEIGHTS", contacts.MANY_WEIGHTS)
    counts = []
    for residues in (150, 300):
        packed = ours.pack([protein(residues, 1)])
        lse = torch.zeros(4, residues + 2)
        query = torch.randn(4, residues + 2, 16)
        contact_map = WholeMap(residues, ours.contact_regression(), ours.device)
        with LiveTensors() as seen:
            contact_map.add(0, query, query, lse, 0.25)
        counts.append(seen.calls)
    assert counts[0] == counts[1] < 60
    torch.testing.assert_close(ours.predict_contacts(packed)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_maps_of_a_cpu(tmp_path):
    ours = load(save(peer(3, 64, 4), tmp_path), device="cpu")
    proteins = [protein(length, length) for length in (5, 300, 1500)]
    # maps are made when they are asked for: before the model moves
    wanted = list(ours.predict_contacts(proteins))
    there = ours.to("cuda")
    for found, whole in zip(there.predict_contacts(proteins), wanted, strict=True):
        assert (found.cpu() - whole).abs().max() <= 1e-4
    for found, whole in zip(kept(there, there.pack(proteins)), wanted, strict=True):
        assert (found - whole).abs().max() <= 1e-4
    narrow = there.to(torch.bfloat16)
    for found, whole in zip(narrow.predict_contacts(proteins), wanted, strict=True):
        assert (found.cpu() - whole).abs().mean() <= 0.05
