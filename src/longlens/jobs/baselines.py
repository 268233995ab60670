"""Baselines by counting residues: the perplexities that a trained model must beat."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from longlens.io.alphabet import Alphabet


def count_perplexities(
    train: Iterable[NDArray[np.int16]], held_out: Iterable[NDArray[np.int16]], alphabet: Alphabet
) -> dict[str, float]:
    """Held-out perplexity of the 20 residues by frequency ("unigram") and given the residue before ("bigram").

    Counts over `train`, plus one; the bigram knows the start token too.
    """
    size = len(alphabet)
    residues = np.zeros(size, bool)
    residues[alphabet.standard] = True
    counts = _pair_counts(train, size)
    tests = _pair_counts(held_out, size)
    counts[:, ~residues] = 0
    tests[:, ~residues] = 0
    counts[:, residues] += 1
    single = counts.sum(0) / counts.sum()
    pair = counts / counts.sum(1, keepdims=True)
    seen = tests > 0
    total = tests.sum()
    return {
        "unigram": float(np.exp(-(tests.sum(0)[residues] * np.log(single[residues])).sum() / total)),
        "bigram": float(np.exp(-(tests[seen] * np.log(pair[seen])).sum() / total)),
    }


def _pair_counts(proteins: Iterable[NDArray[np.int16]], size: int) -> NDArray[np.float64]:
    counts = np.zeros(size * size)
    for tokens in proteins:
        pairs = tokens[:-1].astype(np.int64) * size + tokens[1:]
        counts += np.bincount(pairs, minlength=size * size)
    return counts.reshape(size, size)
