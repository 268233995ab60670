"""The numbers of a T5 tokenizer's pieces, read from its files without its library.

`spiece.model` is a protocol buffer (sentencepiece's `ModelProto`): its field 1, repeated, is a piece, whose field 1 is
the text; pieces are numbered in order. `tokenizer.json`, `added_tokens.json` and `tokenizer_config.json` are
transformers'.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from longlens.errors import CheckpointError

# files of a tokenizer; those that are there must agree
FILES = ("spiece.model", "tokenizer.json", "added_tokens.json", "tokenizer_config.json")
# a protocol buffer's kinds of fields: a number, eight bytes, a length and so many bytes, four bytes
_NUMBER, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


def read_pieces(folder: Path) -> dict[str, int]:
    """The number of each piece, from all of `FILES` that `folder` has; empty where it has none.

    Raises `CheckpointError` for files that are broken or disagree.
    """
    numbers: dict[str, int] = {}
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        for piece, number in _pieces(path):
            if numbers.setdefault(piece, number) != number:
                raise CheckpointError(
                    f"{path}: expected {piece!r} to be token {numbers[piece]}, as the other files of the tokenizer in "
                    f"this folder say, got {number}"
                )
    return numbers


def _pieces(path: Path) -> Iterable[tuple[str, int]]:
    try:
        if path.suffix == ".model":
            return list(_of_sentencepiece(path.read_bytes()))
        return list(_of_json(path.name, json.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected the pieces of a tokenizer, got something else ({error}); fetch it again"
        ) from None


def _of_json(name: str, content: dict[str, Any]) -> Iterator[tuple[str, int]]:
    if name == "added_tokens.json":
        yield from ((str(piece), int(number)) for piece, number in content.items())
    elif name == "tokenizer_config.json":
        added = content.get("added_tokens_decoder", {})
        yield from ((str(entry["content"]), int(number)) for number, entry in added.items())
    else:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            yield from ((str(piece), int(number)) for piece, number in vocabulary.items())
        else:
            yield from ((str(piece), number) for number, (piece, _) in enumerate(vocabulary))
        yield from ((str(entry["content"]), int(entry["id"])) for entry in content.get("added_tokens", []))


def _of_sentencepiece(data: bytes) -> Iterator[tuple[str, int]]:
    pieces = (value for field, value in _fields(data) if field == 1)
    for number, piece in enumerate(pieces):
        text = next((value for field, value in _fields(piece) if field == 1), None)
        if text is None:
            raise ValueError(f"piece {number} has no text")
        yield text.decode("utf-8"), number


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message that hold bytes, with their numbers. Raises `ValueError` where it is none."""
    place = 0
    while place < len(data):
        key, place = _number(data, place)
        kind = key & 7
        if kind == _NUMBER:
            _, place = _number(data, place)
            continue
        if kind not in (_EIGHT, _BYTES, _FOUR):
            raise ValueError(f"a field of kind {kind} at byte {place}")
        length = {_EIGHT: 8, _FOUR: 4}.get(kind, 0)
        if kind == _BYTES:
            length, place = _number(data, place)
        if place + length > len(data):
            raise ValueError("the file is cut off")
        if kind == _BYTES:
            yield key >> 3, data[place : place + length]
        place += length


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits to the byte, least first, and the place after it."""
    number = shift = 0
    while place < len(data):
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, place
        if shift > 63:
            break
    raise ValueError("the file is cut off")
