"""Input files, plain or compressed by gzip, bzip2 or xz, recognised by their first bytes, not by their names."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from longlens.errors import SequenceError

# the first bytes of each format
_HEAD = 10
_GZIP = b"\x1f\x8b"
_XZ = b"\xfd7zXZ\x00"
# a level, then the mark of the first block or of the end: a text may begin with BZh
_BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
_UNREAD = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf\x27\x1c": "7z"}

# suffixes of compressed files, those that are refused when read among them
SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z")

# what reading compressed data raises; bzip2 and gzip use an OSError without a number too, see `is_broken`
READ_FAULTS = (EOFError, zlib.error, lzma.LZMAError, OSError)


def decompressed(file: io.RawIOBase | BinaryIO, name: str) -> BinaryIO:
    """The plain bytes of an open file. `name` is used in messages.

    Reading raises one of `READ_FAULTS` where the data is cut off or broken. Raises `SequenceError` at once for zip,
    zstd and 7z.
    """
    buffered = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, file))
    head = buffered.peek(_HEAD)[:_HEAD]
    for magic, kind in _UNREAD.items():
        if head.startswith(magic):
            raise SequenceError(f"{name}: expected a plain file or one compressed by gzip, bzip2 or xz, got {kind}; "
                                "unpack it first")  # fmt: skip
    if head.startswith(_GZIP):
        return cast(BinaryIO, gzip.GzipFile(fileobj=buffered))
    if head.startswith(_XZ):
        return cast(BinaryIO, lzma.LZMAFile(buffered))
    if _BZIP2.match(head):
        return cast(BinaryIO, bz2.BZ2File(buffered))
    return buffered


def plain_name(path: Path | str) -> str:
    """The name of a file in lower case, without the suffix of its compression: what its content is."""
    name = Path(path).name.lower()
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def is_broken(error: BaseException) -> bool:
    """Whether one of `READ_FAULTS` says that compressed data is cut off or broken, not that a file cannot be read."""
    return not isinstance(error, OSError) or error.errno is None


def read_bytes(path: Path | str, name: str, count: int = -1) -> bytes:
    """The first `count` plain bytes of a file, by default all. Raises `SequenceError` if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return decompressed(file, name).read(count)
    except FileNotFoundError:
        raise SequenceError(f"{name}: expected a file, found none of this name") from None
    except READ_FAULTS as error:
        if is_broken(error):
            raise SequenceError(
                f"{name}: its compressed data is cut off or broken ({error}); fetch the file again"
            ) from error
        raise SequenceError(
            f"{name}: expected a file, it cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
