"""Surprise by token, word and line, and what it says of a whole text.

    word      S(w) = sum_i s_i + beta(c w) - beta(c),   beta(x) = -log sum_{v begins a word or ends the text} p(v | x)

for tokenizers whose tokens begin with the blank before a word: that a word has ended is known only from the token after
it, so its probability is that of its tokens times that of a beginning after it, given one before it (Pimentel & Meister
2024, arXiv:2406.14561). Any token may begin a text, so beta(c) is 0 for the first word, as it is after a token with a
blank at its end (a full stop with its line feed). Blanks before a word count to it.

    bits per byte  = sum surprise / (ln 2 x bytes in UTF-8): comparable between tokenizers
    perplexity     = exp(mean surprise of a token): not comparable
    excess         = mean of surprise - entropy, 0 where the model is calibrated; its standard error is that of the
                     circular block bootstrap (Politis & Romano 1992), for which the mean has a closed form
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Table = dict[str, Any]

UNITS = {"nats": 1.0, "bits": math.log(2)}
BY = ("token", "word", "line")


@dataclass(frozen=True)
class SurprisedText:
    """A text and its numbers, in nats; N tokens. `numbers` (N,) are the tokens' own (`Document.numbers`);
    `starts` and `stops` (N,) in characters; `surprise`, `entropy`,
    `variance` (N,), NaN without a prediction; `rank`, `seen` (N,).

    `first_of_word` (N,) bool: the tokens that begin a word. `begins` (N + 1,): log of the probability that a word
    begins, before each token and after the last; None where the correction of words does not apply.
    """

    text: str
    numbers: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    surprise: Floats
    entropy: Floats
    variance: Floats
    rank: NDArray[np.int64]
    seen: NDArray[np.int64]
    first_of_word: NDArray[np.bool_]
    begins: Floats | None


def after_blank(ids: NDArray[np.int64], ends: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N + 1,) bool: before each token and after the last, whether a token with a blank at its end (`ends` of the
    vocabulary) stands before, so that a word begins for certain."""
    return np.concatenate([[False], ends[ids]])


def table_by(found: SurprisedText, by: str, unit: str) -> Table:
    """The table by "token", "word" or "line", in nats or bits."""
    return {"token": by_token, "word": by_word, "line": by_line}[by](found, UNITS[unit])


def by_token(found: SurprisedText, unit: float) -> Table:
    """token, text, start, stop, surprise, entropy, rank, z, seen."""
    deviation = np.sqrt(found.variance)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(deviation > 0, (found.surprise - found.entropy) / deviation, np.nan)
    return {
        "token": found.numbers,
        "text": [found.text[a:b] for a, b in zip(found.starts, found.stops, strict=True)],
        "start": found.starts, "stop": found.stops, "surprise": found.surprise / unit, "entropy": found.entropy / unit,
        "rank": found.rank, "z": z, "seen": found.seen,
    }  # fmt: skip


def word_bounds(found: SurprisedText) -> list[tuple[int, int]]:
    """Tokens [first, last) of each word; tokens that are blank alone belong to the word after them."""
    edges = [0, *(int(place) for place in np.flatnonzero(found.first_of_word) if place > 0), len(found.starts)]
    words: list[tuple[int, int]] = []
    first = 0
    for stop in edges[1:]:
        if found.text[found.starts[first] : found.stops[stop - 1]].strip() or stop == edges[-1]:
            words.append((first, stop))
            first = stop
    return words


def word_surprise(found: SurprisedText, bounds: list[tuple[int, int]]) -> Floats:
    """(W,) in nats, corrected where `begins` is known."""
    sums = np.array([found.surprise[first:last].sum() for first, last in bounds])
    if found.begins is None:
        return sums
    before = np.array([0.0 if first == 0 else -found.begins[first] for first, _ in bounds])
    after = np.array([-found.begins[last] for _, last in bounds])
    return sums + after - before


def by_word(found: SurprisedText, unit: float) -> Table:
    """word (from 1), text, start, stop, tokens, surprise, uncorrected (the sum of its tokens' surprise), seen."""
    bounds = word_bounds(found)
    places = [_stripped(found, first, last) for first, last in bounds]
    sums = np.array([found.surprise[first:last].sum() for first, last in bounds])
    return {
        "word": np.arange(1, len(bounds) + 1), "text": [found.text[start:stop] for start, stop in places],
        "start": np.array([start for start, _ in places]), "stop": np.array([stop for _, stop in places]),
        "tokens": np.array([last - first for first, last in bounds]),
        "surprise": word_surprise(found, bounds) / unit, "uncorrected": sums / unit,
        "seen": np.array([found.seen[first] for first, _ in bounds]),
    }  # fmt: skip


def _stripped(found: SurprisedText, first: int, last: int) -> tuple[int, int]:
    """Characters of a word without the blanks around it."""
    start, stop = int(found.starts[first]), int(found.stops[last - 1])
    text = found.text[start:stop]
    if not text.strip():
        return start, stop
    return start + len(text) - len(text.lstrip()), stop - len(text) + len(text.rstrip())


def by_line(found: SurprisedText, unit: float) -> Table:
    """line (from 1), text, start, stop, tokens, bytes (with its line feed), surprise, bits_per_byte.

    A token belongs to the line in which it starts; a line without any has a surprise of 0.
    """
    stops = [place + 1 for place, sign in enumerate(found.text) if sign == "\n"]
    edges = np.array([0, *stops] if stops and stops[-1] == len(found.text) else [0, *stops, len(found.text)])
    line = np.searchsorted(edges, found.starts, "right") - 1
    lines = len(edges) - 1
    line = np.minimum(line, lines - 1)
    known = ~np.isnan(found.surprise)
    sums = np.bincount(line[known], found.surprise[known], lines)
    texts = [found.text[a:b] for a, b in pairwise(edges)]
    sizes = np.array([len(text.encode()) for text in texts])
    return {
        "line": np.arange(1, lines + 1), "text": [text.rstrip("\r\n") for text in texts],
        "start": edges[:-1], "stop": edges[:-1] + np.array([len(text.rstrip("\r\n")) for text in texts]),
        "tokens": np.bincount(line, minlength=lines), "bytes": sizes, "surprise": sums / unit,
        "bits_per_byte": sums / math.log(2) / sizes,
    }  # fmt: skip


def summarise(found: SurprisedText) -> dict[str, Any]:
    """Numbers of the whole text; surprise in nats. The bytes are those of tokens that have a prediction."""
    known = ~np.isnan(found.surprise)
    surprise, entropy = found.surprise[known], found.entropy[known]
    size = len(found.text.encode())
    if not known.all():
        # only the first token, or the first ones of windows without a start token, have none
        lost = [found.text[a:b] for a, b in zip(found.starts[~known], found.stops[~known], strict=True)]
        size -= sum(len(text.encode()) for text in lost)
    total = float(surprise.sum())
    excess = surprise - entropy
    table = by_token(found, 1.0)
    z = table["z"][~np.isnan(table["z"])]
    return {
        "tokens": len(found.starts), "predicted": int(known.sum()), "characters": len(found.text), "bytes": size,
        "surprise": total, "bits_per_byte": total / math.log(2) / size if size else math.nan,
        "perplexity": math.exp(min(total / len(surprise), 700.0)) if len(surprise) else math.nan,
        "mean_entropy": float(entropy.mean()) if len(entropy) else math.nan,
        "mean_excess": float(excess.mean()) if len(excess) else math.nan, "mean_excess_error": block_error(excess),
        "mean_z": float(z.mean()) if len(z) else math.nan, "variance_of_z": float(z.var()) if len(z) else math.nan,
        "first_choice": float((found.rank[known] == 1).mean()) if len(surprise) else math.nan,
    }  # fmt: skip


def block_error(values: Floats) -> float:
    """Standard error of the mean of a series whose neighbours depend on one another, by the circular block bootstrap
    with blocks of n^(1/3): sqrt(b / n) times the deviation of the n block means. NaN below 8 values."""
    count = len(values)
    if count < 8:
        return math.nan
    block = math.ceil(count ** (1 / 3))
    sums = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[: block - 1]]))])
    means = (sums[block:] - sums[:-block]) / block
    return float(np.sqrt(block / count * np.mean((means - values.mean()) ** 2)))
