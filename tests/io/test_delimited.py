"""Tables come in as CSV or TSV, plain, gzipped or by standard input, and go out as they came."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys

import pytest

from longlens.errors import SequenceError
from longlens.io.delimited import read_delimited, write_delimited

CSV = 'mutant,note\nA1G,"x, y"\n\nWT,\n'


@pytest.mark.parametrize("name", ["v.csv", "v.csv.gz", "v.tsv", "v.tsv.gz", "v.txt", "v.csv.bz2", "v.tsv.xz", "-"])
def test_every_form_reads_alike_and_is_written_as_it_came(name, tmp_path, monkeypatch):
    tabs = name.startswith("v.t")
    text = 'mutant\tnote\nA1G\t"x, y"\n\nWT\t\n' if tabs else CSV
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    data = packed.get(name.split(".")[-1], bytes)(text.encode())
    path = tmp_path / name
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        table = read_delimited("-")
    else:
        path.write_bytes(data)
        table = read_delimited(path)
    assert table.columns == ["mutant", "note"]
    assert table.rows == [{"mutant": "A1G", "note": "x, y"}, {"mutant": "WT", "note": ""}]
    assert table.place(1).endswith(", line 4")
    written = write_delimited(table, {"score": ["1.0", ""]})
    assert written.splitlines()[0] == ("mutant\tnote\tscore" if tabs else "mutant,note,score")
    again = tmp_path / ("again.tsv" if tabs else "again.csv")
    again.write_text(written)
    assert read_delimited(again).rows == [
        {"mutant": "A1G", "note": "x, y", "score": "1.0"}, {"mutant": "WT", "note": "", "score": ""},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"a,b\n1,2,3\n", "line 2: expected 2 cells, got 3"),
     (b"\x28\xb5\x2f\xfd...", "gzip, bzip2 or xz, got zstd; unpack it first"),
     (b"a\n\xff\xfe\n", "UTF-8"), (gzip.compress(CSV.encode(), mtime=0)[:-12], "cut off")],
)  # fmt: skip
def test_what_is_wrong_is_named(data, words, tmp_path):
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(SequenceError, match=words):
        read_delimited(tmp_path / "t.csv")


def test_files_and_columns_that_are_not_there(tmp_path):
    with pytest.raises(SequenceError, match="cannot be read"):
        read_delimited(tmp_path / "no.csv")
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SequenceError, match=r"a column 'c', found a, b"):
        read_delimited(tmp_path / "t.csv").require(["a", "c"])


def test_empty_cells_at_the_end_of_a_row_may_be_left_out(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1\n")
    assert read_delimited(tmp_path / "t.csv").rows == [{"a": "1", "b": ""}]
