"""Plain texts, and telling them from FASTA."""

from __future__ import annotations

import bz2
import gzip
import lzma

import pytest

from longlens.errors import SequenceError
from longlens.io.texts import looks_like_fasta, read_text

PACKED = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "plain": bytes}


@pytest.mark.parametrize("kind", PACKED)
def test_texts_and_fasta_are_told_apart_however_packed(tmp_path, kind):
    path = tmp_path / "in"
    path.write_bytes(PACKED[kind]("BZh is how bzip2 begins: \u00e9".encode()))
    assert not looks_like_fasta(path)
    assert read_text(path) == "BZh is how bzip2 begins: \u00e9"
    path.write_bytes(PACKED[kind](b"\n >a\nMKT\n"))
    assert looks_like_fasta(path)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz"])
def test_a_cut_or_broken_text_is_an_error_of_ours(tmp_path, kind):
    whole = PACKED[kind](b"a text that is long enough to be cut in the middle, and to be broken there " * 20)
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 255
    for data in (whole[: len(whole) // 2], bytes(broken)):
        (tmp_path / "in").write_bytes(data)
        with pytest.raises(SequenceError, match="cut off or broken"):
            read_text(tmp_path / "in")
