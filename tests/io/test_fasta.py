"""FASTA as it comes."""

from __future__ import annotations

import collections
import gzip

import pytest

from longlens.errors import SequenceError
from longlens.io.fasta import read_fasta


def records(path):
    return [(record.id, record.description, record.sequence) for record in read_fasta(path)]


def write(tmp_path, data):
    path = tmp_path / "in.fasta"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"\n\n  \n", []),
        (b">a first one\nMK\nT\n>b\nGAV", [("a", "first one", "MKT"), ("b", "", "GAV")]),
        (b">a\r\nMK\r\nT\r\n", [("a", "", "MKT")]),
        (b"\n\n>a\n\nMK\n\nT\n\n", [("a", "", "MKT")]),
        (b"\xef\xbb\xbf>a\nMK\n", [("a", "", "MK")]),
        (b">\nMK\n", [("", "", "MK")]),
        (b">a\n>b\nMK\n", [("a", "", ""), ("b", "", "MK")]),
        ("> Größe/../x é\nMK\n".encode(), [("Größe/../x", "é", "MK")]),
        (b">latin\xe9 one\nMK\n", [("latin\ufffd", "one", "MK")]),
    ],
)
def test_records(tmp_path, data, expected):
    assert records(write(tmp_path, data)) == expected
    assert records(write(tmp_path, gzip.compress(data))) == expected


def test_records_before_a_cut_are_given(tmp_path):
    whole = gzip.compress(
        b"".join(b">p%d\n%s\n" % (i, bytes(65 + (i * j) % 20 for j in range(200))) for i in range(900))
    )
    reading = read_fasta(write(tmp_path, whole[: len(whole) // 2]))
    got = []
    with pytest.raises(SequenceError, match="cut off or broken"):
        collections.deque(map(got.append, reading), maxlen=0)
    assert got
    assert all(len(record.sequence) == 200 for record in got)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"MKTAYIAK\n", "expected FASTA, whose first line starts with '>', got 'MKTAYIAK"), (b"\x1f\x8bjunk", "broken")],
)
def test_what_is_no_fasta(tmp_path, data, words):
    with pytest.raises(SequenceError, match=words):
        records(write(tmp_path, data))


def test_files_that_are_none(tmp_path):
    with pytest.raises(SequenceError, match="expected a FASTA file, got a directory"):
        records(tmp_path)
    with pytest.raises(SequenceError, match="expected a FASTA file, found none"):
        records(tmp_path / "nowhere.fasta")
