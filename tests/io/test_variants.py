"""Variants in every usual notation are read alike; what is no substitution is refused with a reason."""

from __future__ import annotations

import pickle

import pytest

from longlens.errors import InputError, SequenceError, VariantError
from longlens.io.variants import Mutation, parse_variant, read_variants

PROTEIN = "MKTAYIAKQRXU"
K2A, T3S = Mutation("K", 1, "A"), Mutation("T", 2, "S")


@pytest.mark.parametrize(
    "text",
    ["K2A", " k2a ", "p.K2A", "p.(K2A)", "Lys2Ala", "LYS2ALA", "lys2ala", "p.Lys2Ala", "p.(Lys2Ala)", "(Lys2Ala)",
     "NP_000537.3:p.Lys2Ala", "P04637:p.(Lys2Ala)", "NP_000537.3(TP53):p.Lys2Ala", "p.[Lys2Ala]"],
)  # fmt: skip
def test_one_substitution_in_every_notation(text):
    assert parse_variant(text, PROTEIN) == (K2A,)


@pytest.mark.parametrize(
    "text",
    ["K2A:T3S", "K2A,T3S", "K2A;T3S", "K2A; T3S", "p.Lys2Ala:p.Thr3Ser", "p.[Lys2Ala;Thr3Ser]",
     "p.[(Lys2Ala);(Thr3Ser)]", "Lys2Ala:T3S", "K2A:p.Thr3Ser", "p.(Lys2Ala):p.(Thr3Ser)", "p.(Lys2Ala);(Thr3Ser)",
     "NP_1.1:p.[Lys2Ala;Thr3Ser]"],
)  # fmt: skip
def test_several_substitutions(text):
    assert parse_variant(text, PROTEIN) == (K2A, T3S)


@pytest.mark.parametrize("text", ["WT", "wt", "=", "p.=", "p.(=)", "wild-type", "_wt", "_sy", "NP_1.1:p.="])
def test_the_wild_type_has_no_substitutions(text):
    assert parse_variant(text, PROTEIN) == ()


@pytest.mark.parametrize("text", ["K2=", "K2K", "p.Lys2=", "p.(Lys2=)"])
def test_what_changes_nothing(text):
    assert parse_variant(text, PROTEIN) == (Mutation("K", 1, "K"),)


def test_numbers_count_from_the_offset():
    assert parse_variant("K25A", PROTEIN, offset=24) == (K2A,)
    assert parse_variant("K-1A", PROTEIN, offset=-2) == (K2A,)
    with pytest.raises(VariantError, match=r"expected a position in 24\.\.35, got 2"):
        parse_variant("K2A", PROTEIN, offset=24)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"), ("  ", "empty"), (None, "empty"), ("NA", "empty"), ("nan", "empty"),
        ("K2*", "stop"), ("K2Ter", "stop"), ("p.Lys2Ter", "stop"), ("p.(Lys2*)", "stop"), ("K2A:T3*", "stop"),
        ("K2del", "deletion"), ("p.Lys2del", "deletion"), ("K2_T3del", "deletion"), ("K2-", "deletion"),
        ("ΔF508", "deletion"), ("delF508", "deletion"), ("K2A:T3del", "deletion"),
        ("K2_T3insA", "insertion"), ("p.Lys2_Thr3insGly", "insertion"), ("K2dup", "duplication"),
        ("K2_T3delinsAG", "insertion and deletion"), ("p.Lys2_Thr3delinsGly", "insertion and deletion"),
        ("K2fs", "frameshift"), ("p.Lys2AlafsTer5", "frameshift"), ("p.Lys2Alafs*5", "frameshift"),
        ("p.Met1ext-5", "extension"), ("K2X", "residue X"), ("K2B", "residue B"), ("K2Z", "residue Z"),
        ("K2J", "residue J"), ("K2U", "residue U"), ("K2O", "residue O"), ("p.Lys2Xaa", "residue X"),
        ("p.Lys2Sec", "residue U"), ("X11A", "residue X"), ("U12C", "residue U"), ("p.Lys2Foo", "residue FOO"),
        ("A2K", "wild type at 2 is K, not A"), ("K200A", "position 200 outside 1..12"),
        ("K0A", "position 0 outside 1..12"), ("K2A:K2G", "position 2 twice"), ("K2", "not a substitution"),
        ("hello", "not a substitution"), ("K2A:", "not a substitution"), ("p.?", "not a substitution"),
        ("c.4A>G", "nucleotide notation"), ("NM_1.2:c.4A>G", "nucleotide notation"),
    ],
)  # fmt: skip
def test_what_is_refused_and_why(text, reason):
    with pytest.raises(SequenceError) as caught:
        parse_variant(text, PROTEIN)
    assert isinstance(caught.value, VariantError)
    assert caught.value.reason == reason
    assert "expected" in str(caught.value)


def test_rows_are_read_or_skipped_with_a_reason():
    rows = ["K2A", "K2*", "WT", None, "K2A:T3S"]
    assert read_variants(rows, PROTEIN, on_error="skip") == [
        ((K2A,), ""), (None, "stop"), ((), ""), (None, "empty"), ((K2A, T3S), ""),
    ]  # fmt: skip
    with pytest.raises(VariantError, match=r"row 2: K2\*: expected substitutions") as caught:
        read_variants(rows, PROTEIN)
    assert caught.value.reason == "stop"
    with pytest.raises(InputError, match="stop or skip"):
        read_variants(rows, PROTEIN, on_error="ignore")


def test_a_refusal_can_be_pickled():
    error = pickle.loads(pickle.dumps(VariantError("a message", "a reason")))
    assert (str(error), error.reason) == ("a message", "a reason")
