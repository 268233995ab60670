"""One token for each residue, always; what cleaning does is counted."""

from __future__ import annotations

import pytest

from longlens.errors import SequenceError
from longlens.io.alphabet import ESM, STANDARD, clean_protein


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
