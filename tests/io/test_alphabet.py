"""One token for each residue, always; what cleaning does is counted."""

from __future__ import annotations

import pytest

from esm_peer import protein
from longlens.errors import SequenceError
from longlens.io.alphabet import ESM, STANDARD, clean_protein, clean_proteins, kind_of, looks_like_alignment


@pytest.mark.parametrize(
    ("raw", "clean", "substituted", "gaps"),
    [
        ("MKT", "MKT", 0, 0),
        ("mkTaa", "MKTAA", 0, 0),
        (" M K\nT\t", "MKT", 0, 0),
        ("MKT*", "MKT", 0, 0),
        ("MKT**", "MKT", 0, 0),
        ("MJ*JT", "MXXXT", 3, 0),
        ("MJJJT*", "MXXXT", 3, 0),
        ("UBZOX", "UBZOX", 0, 0),
        ("M--K.T", "MKT", 0, 3),
    ],
)
def test_cleaning(raw, clean, substituted, gaps):
    protein = clean_protein(raw)
    assert (protein.sequence, protein.substituted, protein.gaps) == (clean, substituted, gaps)
    assert len(ESM.encode(protein.sequence)) - 2 == len(protein)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("MK1T", "got '1' at position 3"),
        ("MK T?A", r"got '\?' at position 4"),
        ("MKé", "got 'é' at position 3"),
        ("mkTß", "got 'ß' at position 4"),
        ("MKT:GAV", "got ':' at position 4; split a complex"),
        ("", "at least one residue, got none"),
        ("***", "at least one residue, got none"),
        ("--", "at least one residue, got none"),
    ],
)
def test_anything_else_is_an_error_with_record_position_and_character(raw, words):
    with pytest.raises(SequenceError, match=f"a.fasta, record 3.*{words}"):
        clean_protein(raw, "a.fasta, record 3 (x)")


def test_the_alphabet_is_that_of_esm_2():
    # facts of the format: numbers from 4 by frequency, special tokens around
    assert len(ESM) == 33
    assert ESM.encode("LAGVSERTIDPKQNFYMHWCXBUZO").tolist() == [0, *range(4, 29), 2]
    assert (ESM.start, ESM.pad, ESM.end, ESM.unknown, ESM.mask) == (0, 1, 2, 3, 32)
    assert ESM.decode(ESM.standard) == STANDARD


def test_one_string_is_one_protein_and_each_is_cleaned():
    assert clean_proteins("mk tay*") == ["MKTAY"]
    assert clean_proteins(iter(["mkt", "G\nAV"])) == ["MKT", "GAV"]


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        (["MKT", "MK1T"], "sequence 2: expected amino acids .* got '1' at position 3"),
        (["MKT:GAV"], "sequence 1: .* got ':' at position 4; split a complex"),
        (["MKT", ""], "sequence 2: expected at least one residue"),
        (["MKT", 5], "sequence 2: expected a string of residues, got int"),
        (b"MKT", "sequence 1: expected a string of residues, got int"),
        ([], "expected at least one protein, got none"),
    ],
)
def test_sequences_that_cannot_be_cleaned_are_named_by_number(sequences, words):
    with pytest.raises(SequenceError, match=words):
        clean_proteins(sequences)


def test_changed_residues_and_gaps_are_warned_of():
    with pytest.warns(UserWarning, match="sequence 1: 2 residues"):
        assert clean_proteins(["MJ*T"]) == ["MXXT"]
    with pytest.warns(UserWarning, match="sequence 2: 1 gaps were left out"):
        assert clean_proteins(["MKT", "M-T"]) == ["MKT", "MT"]


@pytest.mark.parametrize("raw", ["mkt", "MK T", "MK-T", "M1T", "MJT", "MéT"])
def test_only_cleaned_sequences_are_numbered(raw):
    with pytest.raises(SequenceError, match=r"expected a cleaned sequence .* at position"):
        ESM.encode(raw)


PROSE = "We hold these truths to be self-evident, that all men are created equal"


@pytest.mark.parametrize(
    ("sequence", "kind"),
    [
        (PROSE, "text"),
        ("".join(character for character in PROSE if character.isalpha()), "text"),
        ("The quick brown fox jumps over the lazy dog", "text"),
        ("ACGTTGCAACGTAGGCATTAGCCNNN", "dna"),
        ("acguugcaacguaggcauuagcc", "dna"),
        ("MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "protein"),
        ("MKTAYIAKQR QISFVKSHFS RQLEERLGLI EVQAPILSRV GDGTQDNLSG AEK", "protein"),
        ("M K T A Y I A K Q R Q I S F V K S H F S R Q", "protein"),
        ("MKTAY*", "protein"),
        ("GAGAGSGAGAGSGAGAGSGAGAGS", "protein"),
        ("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "protein"),
        ("EEEEEEEEETTEEEEEEEEEEEEEETEEEEEE", "protein"),
        ("ACGT", "protein"),
        ("MK--TAY", "aligned"),
        ("", "protein"),
        *((protein(length, length), "protein") for length in (1, 20, 21, 40, 90, 1000)),
    ],
)
def test_kinds_of_sequence(sequence, kind):
    assert kind_of(sequence) == kind


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        (["MKT-A", "MKTAA"], True),
        (["MKTA", "MKaaT-", "M-TA"], True),
        (["MKT.A", "MKTaA"], True),
        (["MKTAY", "MK.AY", "MKTA."], True),
        (["MKTA", "MKTA"], False),
        (["MK-TA"], False),
        (["MK-TA", "MKT"], False),
        (["mk-ta", "mkta"], False),
        ([], False),
    ],
)
def test_alignments_are_told_from_single_proteins(sequences, expected):
    assert looks_like_alignment(sequences) is expected
