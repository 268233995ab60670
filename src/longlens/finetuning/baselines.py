"""What a fine-tuned model must beat: predictors that know no model.

majority or mean; length; composition (for residues: the residue and its protein's composition); the target of the most
similar training protein, transferred residue by residue through the alignment. Length and composition are given to the
same linear regression as the model's vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longlens.finetuning.probe import Linear, fit_probe
from longlens.finetuning.rows import Rows, Vectors, gather
from longlens.finetuning.similarity import Neighbour, can_align, local_pairs
from longlens.finetuning.targets import Targets
from longlens.io.alphabet import STANDARD

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Known:
    """What a baseline may use: cleaned sequences, targets, the training and validation proteins, class weights."""

    sequences: Sequence[str]
    targets: Targets
    training: Sequence[int]
    validation: Sequence[int]
    class_weights: Floats


def baseline_outputs(
    known: Known, queries: Sequence[int], neighbours: Sequence[Neighbour], seed: int
) -> dict[str, list[Floats]]:
    """For each baseline the outputs (1 or L, C) of each of `queries`: probabilities of classes, or values."""
    constant = _constant(known)
    name = "majority" if known.targets.task.classes else "mean"
    lengths = [1 if not known.targets.task.by_residue else len(known.sequences[query]) for query in queries]
    outputs = {name: [np.tile(constant, (length, 1)) for length in lengths]}
    for name, features in (("length", _length), ("composition", _composition)):
        parts = [features(sequence, known.targets.task.by_residue) for sequence in known.sequences]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        vectors = Vectors(np.concatenate(parts), starts)
        probe = fit_probe(
            known.targets, *(gather(vectors, known.targets, part, known.class_weights, seed)
                             for part in (known.training, known.validation)),
        )  # fmt: skip
        outputs[name] = [as_outputs(known.targets, probe, vectors.of(query)) for query in queries]
    outputs["nearest"] = [
        _transferred(known, query, neighbour, constant, length)
        for query, neighbour, length in zip(queries, neighbours, lengths, strict=True)
    ]
    return outputs


def as_outputs(targets: Targets, probe: Linear, inputs: NDArray[np.floating]) -> Floats:
    """Probabilities (R, C) or values (R, 1)."""
    raw = probe(inputs)
    if not targets.task.classes:
        return raw * probe.spread + probe.centre
    exp = np.exp(raw - raw.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def _constant(known: Known) -> Floats:
    """(C,): the shares of the classes over training proteins, or the mean value."""
    no_vectors = Vectors(*_empty(known))
    rows: Rows = gather(no_vectors, known.targets, known.training, np.ones(known.targets.outputs), None)
    if not known.targets.task.classes:
        return np.array([np.average(rows.truth, weights=rows.weights)])
    counts = np.bincount(rows.truth.astype(np.int64), weights=rows.weights, minlength=known.targets.outputs)
    return counts / counts.sum()


def _empty(known: Known) -> tuple[Floats, NDArray[np.int64]]:
    starts = np.concatenate([[0], np.cumsum([len(values) for values in known.targets.values])])
    return np.empty((int(starts[-1]), 0)), starts


def _length(sequence: str, by_residue: bool) -> Floats:
    """The length and its logarithm; for residues also the distance to the nearer end."""
    count = len(sequence)
    if not by_residue:
        return np.array([[count, np.log(count)]], np.float64)
    places = np.arange(count)
    ends = np.minimum(places, count - 1 - places)
    return np.stack([np.full(count, np.log(count)), ends / count, np.log1p(ends)], 1)


def _composition(sequence: str, by_residue: bool) -> Floats:
    codes = np.frombuffer(sequence.encode("ascii"), np.uint8)
    which = codes[:, None] == np.frombuffer(STANDARD.encode("ascii"), np.uint8)[None, :]
    shares = which.mean(0, dtype=np.float64)
    if not by_residue:
        return shares[None, :]
    return np.concatenate([which.astype(np.float64), np.tile(shares, (len(sequence), 1))], 1)


def _transferred(known: Known, query: int, neighbour: Neighbour, constant: Floats, length: int) -> Floats:
    """The neighbour's target, or `constant` where there is none."""
    out = np.tile(constant, (length, 1))
    if neighbour.number < 0:
        return out
    theirs = known.targets.values[neighbour.number]
    pairs = np.zeros((1, 2), np.int64)
    if known.targets.task.by_residue:
        a, b = known.sequences[query], known.sequences[neighbour.number]
        if not can_align(a, b):
            return out
        pairs = local_pairs(a, b)
    for place, other in pairs.tolist():
        if not np.isnan(theirs[other]):
            out[place] = np.eye(len(constant))[int(theirs[other])] if known.targets.task.classes else theirs[other]
    return out
