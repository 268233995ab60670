"""FASTA as it comes."""

from __future__ import annotations

import bz2
import collections
import gzip
import lzma
import pickle
import random
import zipfile

import pytest

from longlens.errors import SequenceError, TruncatedInputError
from longlens.io.fasta import read_fasta

PACKED = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


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
    for pack in PACKED.values():
        assert records(write(tmp_path, pack(data))) == expected


@pytest.mark.parametrize("kind", PACKED)
def test_records_before_a_cut_are_given_and_counted(tmp_path, kind):
    draw = random.Random(0)
    plain = b"".join(b">p%d\n%s\n" % (i, bytes(draw.choices(b"ACDEFGHIKLMNPQRSTVWY", k=2000))) for i in range(900))
    whole = PACKED[kind](plain)
    reading = read_fasta(write(tmp_path, whole[: len(whole) * 3 // 4]))
    got = []
    with pytest.raises(TruncatedInputError, match=r"cut off or broken .* after") as raised:
        collections.deque(map(got.append, reading), maxlen=0)
    assert got
    assert all(len(record.sequence) == 2000 for record in got)
    assert (raised.value.records, raised.value.residues) == (len(got), 2000 * len(got))
    assert f"{len(got)} whole records of {2000 * len(got)} residues, the last 'p{len(got) - 1}'" in str(raised.value)


@pytest.mark.parametrize("kind", PACKED)
def test_broken_compression_is_no_traceback(tmp_path, kind):
    whole = bytearray(PACKED[kind](b">a\nMKT\n" * 400))
    whole[len(whole) // 2] ^= 255
    with pytest.raises(TruncatedInputError, match="cut off or broken") as raised:
        records(write(tmp_path, bytes(whole)))
    assert raised.value.records < 400
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (str(copy), copy.records, copy.residues) == (str(raised.value), raised.value.records, raised.value.residues)


def test_other_archives_are_named(tmp_path):
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.fasta", ">a\nMKT\n")
    with pytest.raises(SequenceError, match="gzip, bzip2 or xz, got zip; unpack it first"):
        records(path)


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
    with pytest.raises(SequenceError, match="expected a FASTA file, found no file of this name"):
        records(tmp_path / "nowhere.fasta")


def test_a_null_byte_in_a_header_is_replaced(tmp_path):
    (tmp_path / "p.fasta").write_bytes(b">a\x00b c\x00d\nMK\n")
    (record,) = read_fasta(tmp_path / "p.fasta")
    assert (record.id, record.description) == ("a\ufffdb", "c\ufffdd")
