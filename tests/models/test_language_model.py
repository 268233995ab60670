"""What a model takes as proteins, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import longlens
from esm_peer import esm, save
from longlens.errors import SequenceError
from longlens.io.alphabet import clean_protein


@pytest.fixture(scope="module")
def tiny():
    return longlens.load("tiny")


@pytest.mark.parametrize("raw", ["mkta", " M K\nTA ", "MKTA*"])
def test_python_cleans_as_the_command_line_does(tiny, raw):
    assert tiny.pack([raw]).tokens.tolist() == tiny.alphabet.encode(clean_protein(raw).sequence).tolist()
    assert torch.equal(tiny.pack([raw]).tokens, tiny.pack(["MKTA"]).tokens)


def test_one_string_is_one_protein(tiny):
    packed = tiny.pack("MKTAYIAK")
    assert packed.cu_seqlens.tolist() == [0, 10]
    assert torch.equal(packed.tokens, tiny.pack(["MKTAYIAK"]).tokens)


def test_one_string_has_one_contact_map(tmp_path):
    model = longlens.load(save(esm(1, 32, 4), tmp_path))
    assert [tuple(contacts.shape) for contacts in model.predict_contacts("mktayiak")] == [(8, 8)]


@pytest.mark.parametrize("raw", ["MKT1", "MKT:GAV", "MK?T"])
def test_what_is_no_residue_is_refused_by_sequence_and_position(tiny, raw):
    place = next(place for place, character in enumerate(raw, 1) if not character.isalpha())
    with pytest.raises(SequenceError, match=f"sequence 2: .* at position {place}"):
        tiny.pack(["MKT", raw])


def test_gaps_are_no_tokens(tiny):
    with pytest.warns(UserWarning, match="1 gaps were left out"):
        assert torch.equal(tiny.pack(["MK-T"]).tokens, tiny.pack(["MKT"]).tokens)
