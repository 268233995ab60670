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


TEXTS = {
    "mail": "> Are you coming to the meeting on Monday?\n> It begins at nine.\n\nYes, I am.\n",
    "short mail": "> Coffee?\n\nthanks, no\n",
    "very short": "> Tea?\n\nWell yes\n",
    "nested": ">> Who wrote this?\n> I did.\nThen all is well, and the work can go on as it was planned before.\n",
    "all quoted": "> The whole file is a quote\n> of two lines\n",
    "one line": "> a quote",
    "markdown": ">Everything should be made as simple as possible.\n\nThis is often said, and seldom done.\n",
    "answered": "> first point\n\nI agree with the first point, as you know.\n\n> second\n\nNo.\n",
}
FASTA = {
    "one": ">a\nMKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ\n",
    "a blank before the name": "> a\nMKTAYIAKQR\n",
    "peptides": ">1\nSIINFEKL\n>2\nGILGFVFTL\n>3\nKVAELVHF\n>4\nFLYAL\n>5\nLLFGYPVY\n>6\nTAX\n",
    "lower case": ">a\nmktayiakqrqisfvkshfsrqleerlgliev\nqaplt\n",
    "groups": ">a\nMKTAYIAKQR QISFVKSHFS RQLEERLGLI EVQ\nMKTAYIAKQR QISFVKSHFS\n",
    "lower-case groups": ">a\nmktayiakqr qisfvkshfs rqleerlgli evq\nmktayiakqr qisfvkshfs\n",
    "a complex": ">a\nMKTAYIAK:GGSAYIW:\n",
    "a broken one": ">a\nMKT1AY\n",
    "names alone": ">a\n>b\n",
    "an empty record": ">a\n>b\nMKTAYIAKQRQISFVKSHFSRQ\n",
    "a short one": ">a\nMk\n",
}


@pytest.mark.parametrize("name", [*TEXTS, *FASTA])
def test_quotes_are_texts_and_sequences_are_fasta(tmp_path, name):
    path = tmp_path / "in"
    path.write_text((TEXTS | FASTA)[name])
    assert looks_like_fasta(path) == (name in FASTA)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz"])
def test_a_cut_or_broken_text_is_an_error_of_ours(tmp_path, kind):
    whole = PACKED[kind](b"a text that is long enough to be cut in the middle, and to be broken there " * 20)
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 255
    for data in (whole[: len(whole) // 2], bytes(broken)):
        (tmp_path / "in").write_bytes(data)
        with pytest.raises(SequenceError, match="cut off or broken"):
            read_text(tmp_path / "in")
