"""What `proteins` may be: files, sequences, a mapping; one string is one protein."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

import longlens
from esm_peer import protein
from longlens.errors import InputError, LonglensWarning, SequenceError
from longlens.jobs.inputs import SelectedRecords, SequenceReader, open_proteins


def read(proteins, **keywords):
    with open_proteins(proteins, **keywords) as source:
        return [entry.id for entry in source.survey.entries], list(source.sequences())


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "two.fasta"
    path.write_text(">a\nMKTAYI\n>b\nGAVLI\n")
    return path


def test_files_sequences_and_mappings(fasta):
    two = (["a", "b"], ["MKTAYI", "GAVLI"])
    assert read(fasta) == read(str(fasta)) == read([fasta]) == two
    assert read([fasta, str(fasta)]) == (["a", "b"] * 2, two[1] * 2)
    assert read({"a": "MKTAYI", "b": "gavli"}) == two
    assert read("mktayi") == (["1"], ["MKTAYI"])
    assert read(["MKTAYI", "GA VLI"]) == (["1", "2"], two[1])


def test_a_name_that_is_no_file_is_a_sequence_and_what_looks_like_a_path_is_one(fasta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read("two.fasta")[0] == ["a", "b"]
    for missing in ("none.fasta", "folder/none", "none.fa.gz"):
        with pytest.raises(SequenceError, match="found no file"):
            read(missing)
    # far longer than a file's name may be
    assert read(protein(5000, 0)) == (["1"], [protein(5000, 0)])
    Path("proteins").write_text(">a\nMK\n")
    with pytest.raises(InputError, match=r"'proteins' is both a file in this folder and a protein"):
        read("proteins")
    assert read(Path("proteins")) == (["a"], ["MK"])
    assert read({"x": "proteins"}) == (["x"], ["PROTEINS"])


def test_what_is_neither_is_refused(fasta):
    with pytest.raises(InputError, match="got both in one list"):
        read([fasta, "MKT"])
    with pytest.raises(SequenceError, match="an empty list"):
        read([])
    with pytest.raises(InputError, match="got int"):
        read([3])
    with pytest.raises(InputError, match="got int for 'a'"):
        read({"a": 3})
    with pytest.raises(SequenceError, match=r"sequences, record 2 \(2\): .* got '2' at position 2"):
        read(["MK", "M2"])
    assert read(["MK", "M2"], on_error="skip") == (["1"], ["MK"])
    with pytest.raises(InputError, match="on_error"):
        read("MK", on_error="ignore")


def test_ranges_are_read_forwards_once_and_again_from_the_start():
    texts = [protein(5 + n, n) for n in range(6)]
    with open_proteins(texts) as source:
        reader = SequenceReader(source)
        for first, last in ((0, 2), (2, 3), (2, 5), (4, 6), (0, 1), (5, 6)):
            assert reader.take(first, last) == texts[first:last]
        chosen = SequenceReader(SelectedRecords(source, ["2", "5"]))
        assert chosen.take(0, 2) == [texts[1], texts[4]]
        with pytest.raises(InputError, match="no record has the id 9"):
            SelectedRecords(source, ["9"])


DNA = "ATGGCCATTGTAATGGGCCGCTGAAAGGGTGCCCGATAG"
ENGLISH = "It was the best of times it was the worst of times it was the age of wisdom it was the age of foolishness"


def test_nucleic_acids_and_alignments_are_warned_of():
    with open_proteins({"gene": DNA, "b": protein(60, 0)}) as source:
        (warning,) = source.survey.warnings
        assert re.search(r"1 of 2 records look like DNA or RNA \(the first: sequences, record 1 \(gene\)\)", warning)
    rows = {"a": "MKTAYIAKQR--GAV", "b": "MKTA--AKQRLLGAV", "c": "MKTAYIAKgQRL-GAV"}
    with open_proteins(rows) as source:
        assert "rows of an alignment" in source.survey.warnings[0]
    with open_proteins([protein(50, n) for n in range(20)]) as source:
        assert source.survey.warnings == []


def test_warnings_reach_python_and_a_callback():
    with pytest.warns(LonglensWarning, match="1 of 1 records look like DNA"):
        longlens.embed({"gene": DNA})
    events = []
    longlens.embed({"gene": DNA}, progress=events.append)
    assert any("look like DNA" in str(event) for event in events)
    with pytest.warns(LonglensWarning, match="1 record is skipped; the first: .*b"):
        longlens.embed({"a": "MKT", "b": "M1T"}, on_error="skip")


def test_an_empty_string_is_no_folder():
    with pytest.raises(SequenceError, match="at least one residue"):
        longlens.embed("")


def test_prose_is_no_protein(tmp_path):
    path = tmp_path / "text.fasta"
    path.write_text(f">dickens\n{ENGLISH}\n>a\nMKT\n")
    with pytest.raises(SequenceError, match=r"record 1 \(dickens\): expected a protein, got letters in the prop"):
        read(path)
    assert read(path, on_error="skip") == (["a"], ["MKT"])


def test_a_file_that_is_cut_off_says_how_much_was_read(tmp_path):
    path = tmp_path / "cut.fasta.gz"
    whole = gzip.compress("".join(f">p{i}\n{protein(300, i)}\n" for i in range(200)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with open_proteins(path, on_error="skip") as source:
        (skipped,) = source.survey.skipped
        entries = source.survey.entries
        assert f"after {len(entries)} whole records of {300 * len(entries)} residues" in skipped.reason
        assert "every record after that is lost" in skipped.reason
        assert len(list(source.sequences())) == len(entries)
