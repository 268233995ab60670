"""Proteins with targets: biotrainer's headers, tables, files of labels; every fault names its line."""

from __future__ import annotations

import bz2
import gzip
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longlens.errors import SequenceError
from longlens.io.targets import read_labelled


def read(path, text, *, by_residue=False, numbers=False, **more):
    path.write_text(text)
    return read_labelled(path, by_residue=by_residue, numbers=numbers, **more)


def test_headers_of_biotrainer(tmp_path):
    text = """
>a TARGET=membrane SET=train VALIDATION=False
MKTAYIAK
>b SET=train VALIDATION=True TARGET=soluble
MKTAY
>c TARGET=soluble SET=test
MK-TA*
>d SET=pred
MKT
"""
    proteins = read(tmp_path / "f.fasta", text)
    assert [protein.targets for protein in proteins] == [("membrane",), ("soluble",), ("soluble",), ()]
    assert [protein.set for protein in proteins] == ["train", "validation", "test", "predict"]
    assert proteins[2].sequence == "MKTA"
    assert proteins[2].place.endswith("f.fasta, line 6 (c)")


def test_targets_of_residues_in_headers_labels_and_tables(tmp_path):
    (tmp_path / "f.fasta").write_text(">a\nMKTA\n>b\nMK\n")
    labels = tmp_path / "labels.fasta"
    labels.write_text(">b SET=test\nHH\n>a SET=train VALIDATION=True MASK=1101\nHHEE\n")
    proteins = read_labelled(tmp_path / "f.fasta", by_residue=True, numbers=False, labels=labels)
    assert [(protein.targets, protein.set) for protein in proteins] == [
        (("H", "H", "", "E"), "validation"), (("H", "H"), "test"),
    ]  # fmt: skip
    (protein,) = read(tmp_path / "g.fasta", ">a TARGET=HHEE\nMKTA\n", by_residue=True)
    assert protein.targets == ("H", "H", "E", "E")
    (protein,) = read(tmp_path / "g.fasta", ">a TARGET=1.5;-2;nan;0\nMKTA\n", by_residue=True, numbers=True)
    assert protein.targets == ("1.5", "-2", "nan", "0")
    (protein,) = read(
        tmp_path / "t.csv", 'id,sequence,target\na,MKTA,"[1.5, -2, 3, 0]"\n', by_residue=True, numbers=True
    )
    assert protein.targets == ("1.5", "-2", "3", "0")
    (tmp_path / "labels.csv").write_text("id,target\na,HHEE\nb,EE\n")
    proteins = read_labelled(tmp_path / "f.fasta", by_residue=True, numbers=False, labels=tmp_path / "labels.csv")
    assert proteins[1].targets == ("E", "E")


def test_tables_of_text_and_parquet_say_the_same(tmp_path):
    rows = {"id": ["a", "b"], "sequence": ["MKTA", "MK"], "solubility": [0.25, 1.0], "set": ["train", "test"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    text = "\t".join(rows) + "\na\tMKTA\t0.25\ttrain\nb\tMK\t1.0\ttest\n"
    found = [
        read(tmp_path / "t.tsv", text, numbers=True, target_col="solubility"),
        read_labelled(tmp_path / "t.parquet", by_residue=False, numbers=True, target_col="solubility"),
    ]
    for proteins in found:
        assert [(p.record.id, p.sequence, p.targets, p.set) for p in proteins] == [
            ("a", "MKTA", ("0.25",), "train"), ("b", "MK", ("1.0",), "test"),
        ]  # fmt: skip
    pq.write_table(pa.table({"id": ["a"], "sequence": ["MK"], "target": [[0.5, None]]}), tmp_path / "l.parquet")
    (protein,) = read_labelled(tmp_path / "l.parquet", by_residue=True, numbers=True)
    assert protein.targets == ("0.5", "")


@pytest.mark.parametrize(
    ("text", "by_residue", "said"),
    [
        (">a TARGET=x\nMK\n\n>b SET=train\nMK\n", False, r"line 4 \(b\): expected a target, got none"),
        (">a TARGET=x\nMK\n>a TARGET=y\nMK\n", False, r"line 3 \(a\): expected ids that occur once"),
        (">a TARGET=x SET=trian\nMK\n", False, r"line 1 \(a\): expected SET of train, .* got 'trian'"),
        (">a TARGET=x SET=train VALIDATION=maybe\nMK\n", False, "expected VALIDATION of True or False, got 'maybe'"),
        (">a TARGET=x SET=test VALIDATION=True\nMK\n", False, "VALIDATION=True in the training set"),
        (">a TARGET=x SET=train\nMK\n>b TARGET=x\nMK\n", False, r"line 3 \(b\): expected a SET, as other records"),
        (">a TARGET=HHE\nMK\n", True, r"line 1 \(a\): expected 2 targets, one for each residue, got 3"),
        (">a TARGET=HHE\nM-K\n", True, "expected residues without gaps"),
        (">a TARGET=HH MASK=2\nMK\n", True, "expected a mask of 2 digits"),
        (">a TARGET=x\nM1K\n", False, r"line 1 \(a\): expected amino acids .* got '1' at position 2"),
        ("", False, "found none"),
        ("id,sequence,target\na,MK,x\nb,MK,\n", False, r"line 3 \(b\): expected a target"),
        ("id,sequence,label\na,MK,x\n", False, "expected a column 'target', found id, sequence, label"),
    ],
)
def test_faults_name_their_line(tmp_path, text, by_residue, said):
    path = tmp_path / ("f.csv" if text.startswith("id") else "f.fasta")
    with pytest.raises(SequenceError, match=said):
        read(path, text, by_residue=by_residue)


def test_labels_that_do_not_fit(tmp_path):
    (tmp_path / "f.fasta").write_text(">a\nMKTA\n>b\nMK\n")
    labels = tmp_path / "labels.fasta"
    for text, said in (
        (">a\nHHEE\n", "line 3 .b.: expected its targets in .*labels.fasta, found none of that id"),
        (">a\nHHEE\n>b\nHH\n>c\nHH\n", "line 5 .c.: expected targets of proteins in the file"),
        (">a\nHHEE\n>b\nH\n", "labels.fasta, line 3 .b.: expected 2 targets, .* got 1"),
    ):
        labels.write_text(text)
        with pytest.raises(SequenceError, match=said):
            read_labelled(tmp_path / "f.fasta", by_residue=True, numbers=False, labels=labels)
    with pytest.raises(SequenceError, match="a file of labels holds targets of residues"):
        read_labelled(tmp_path / "f.fasta", by_residue=False, numbers=False, labels=labels)
    (tmp_path / "t.parquet").write_text("no")
    with pytest.raises(SequenceError, match="expected a Parquet file"):
        read_labelled(tmp_path / "t.parquet", by_residue=False, numbers=False)


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_tables_are_tables(suffix, pack, tmp_path):
    rows = {"id": ["a", "b"], "sequence": ["MKTA", "MK"], "target": ["x", "y"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    plain = {"t.parquet": (tmp_path / "t.parquet").read_bytes(), "t.csv": b"id,sequence,target\na,MKTA,x\nb,MK,y\n"}
    for name, data in plain.items():
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(pack(data))
        proteins = read_labelled(path, by_residue=False, numbers=False)
        assert [(protein.sequence, protein.targets) for protein in proteins] == [("MKTA", ("x",)), ("MK", ("y",))]


def test_a_table_that_cannot_be_unpacked_is_refused_as_such(tmp_path):
    for name in ("t.csv.zst", "t.parquet.zst"):
        (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd...")
        with pytest.raises(SequenceError, match="got zstd; unpack it first"):
            read_labelled(tmp_path / name, by_residue=False, numbers=False)
