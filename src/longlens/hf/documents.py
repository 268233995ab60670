"""A text as tokens with their places, and the windows of tokens in which a model reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.errors import InputError, UnsupportedError
from longlens.hf.texts import TextModel

# how tokenizers write a blank, line feed, tabulator or carriage return at the beginning of a token: SentencePiece,
# byte-level BPE, SentencePiece's single bytes, and as they are
BLANKS = (
    "\u2581", "\u0120", "\u010a", "\u0109", "\u010d", "<0x20>", "<0x0A>", "<0x09>", "<0x0D>", " ", "\n", "\t", "\r",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A text of N tokens. `ids` (N,) without special tokens; `starts` and `stops` (N,) in characters of `text`.

    Characters that a byte-level tokenizer splits belong to several tokens, whose places then overlap. `before` and
    `after`: the special tokens that the model gets around each window of the text.
    """

    text: str
    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self, start: int, stop: int) -> NDArray[np.int64]:
        """What the model gets for tokens start..stop: those, with the special tokens around them."""
        return np.concatenate([self.before, self.ids[start:stop], self.after]).astype(np.int64)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """(N,): the number of each token where the model gets the whole text, the special tokens before it included."""
        return len(self.before) + np.arange(len(self.ids))

    def first_of_words(self) -> NDArray[np.bool_]:
        """(N,) bool: the tokens after a blank in the text, or with one at their beginning."""
        first = [
            start == 0 or self.text[start : start + 1].isspace() or self.text[start - 1 : start].isspace()
            for start in self.starts.tolist()
        ]
        # tokens of one character that a byte-level tokenizer splits begin at the same place
        again = np.concatenate([[False], self.starts[1:] == self.starts[:-1]])
        return np.array(first, bool) & ~again

    @property
    def pieces(self) -> list[str]:
        """The text of each token."""
        return [self.text[start:stop] for start, stop in zip(self.starts, self.stops, strict=True)]


def read_document(model: TextModel, text: str, place: str, *, causal: bool, bos: bool | None = None) -> Document:
    """The tokens of a text. `bos`: whether a causal model gets its start token first; None: if the tokenizer has one.

    A masked model gets the special tokens that its tokenizer puts around a text. `place` names the text in errors.

    Raises:
        InputError: no text, or a start token that the tokenizer does not have.
        UnsupportedError: a tokenizer that does not tell the places of its tokens.
    """
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            f"{model.name}: its tokenizer ({type(tokenizer).__name__}) does not tell which characters a token stands "
            "for; save it as a fast one (tokenizer.json)"
        )
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, padding=False, verbose=False
    )
    ids = np.asarray(encoded["input_ids"], np.int64)
    if not len(ids):
        raise InputError(f"{place}: expected a text, got none")
    places = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    before, after = _start(tokenizer, model.name, bos) if causal else _around(tokenizer)
    return Document(text, ids, places[:, 0], places[:, 1], before, after)


def _start(tokenizer: Any, name: str, bos: bool | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    number = tokenizer.bos_token_id
    if bos and number is None:
        raise InputError(f"{name}: its tokenizer has no start token; leave out --bos")
    return ((number,) if number is not None and bos is not False else ()), ()


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens before and after a text."""
    marker = -1
    built = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True, verbose=False)
    special = [marker if not flag else number for number, flag in zip(
        built["input_ids"], built["special_tokens_mask"], strict=True
    )]  # fmt: skip
    first = special.index(marker) if marker in special else len(special)
    last = len(special) - special[::-1].index(marker) if marker in special else len(special)
    return tuple(special[:first]), tuple(special[last:])


@dataclass(frozen=True)
class WordEdges:
    """Which tokens of a vocabulary of V begin and end a word.

    `begins` (V,) bool: those with a leading blank, and the end of the text. `ends` (V,) bool: those with a blank at
    their end (a full stop with its line feed), after which every token begins a word.
    """

    begins: Tensor
    ends: Tensor


def word_edges(tokenizer: Any, size: int) -> WordEdges | None:
    """Those of a tokenizer, for a head of `size` tokens; None where it has no tokens with a leading blank, so that it
    cannot be told from a token whether it begins a word."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    begins, ends = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    for number, piece in enumerate(pieces):
        begins[number] = bool(piece) and piece.startswith(BLANKS)
        ends[number] = bool(piece) and piece.endswith(BLANKS)
    if not bool(begins.any()):
        return None
    if tokenizer.eos_token_id is not None:
        begins[tokenizer.eos_token_id] = True
    return WordEdges(begins, ends)


@dataclass(frozen=True)
class Window:
    """Tokens start..stop of a text that a model reads at once; those of first..last get their surprise from it."""

    start: int
    stop: int
    first: int
    last: int


def windows(count: int, size: int, stride: int, *, causal: bool) -> list[Window]:
    """Windows of `size` of `count` tokens, each `stride` after the one before; the last one ends with the text.

    So all have `size` tokens, unless the text has fewer. A token gets its surprise from the first window that has it
    (causal), or from the one of two in whose middle it is nearer (masked).

    Raises `InputError` for a size or stride below 1, or a stride beyond the size.
    """
    if size < 1 or not 1 <= stride <= size:
        raise InputError(
            f"expected windows of at least 1 token of the text and a stride from 1 to that, got {size} and {stride}"
        )
    starts = [*range(0, max(count - size, 0), stride), max(count - size, 0)]
    found = []
    first = 0
    for place, start in enumerate(starts):
        stop = min(start + size, count)
        last = stop
        if not causal and place + 1 < len(starts):
            last = (starts[place + 1] + stop) // 2
        found.append(Window(start, stop, first, last))
        first = last
    return found
