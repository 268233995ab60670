"""Predictions for each residue from packed forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.errors import InputError
from longlens.io.alphabet import Alphabet
from longlens.lens.predict.vocabulary import Predictions, predictions
from longlens.models.encoder import Attend, Encoded, Packed
from longlens.models.language_model import MaskedLM


@dataclass(frozen=True)
class ResidueIndex:
    """Residue `residue` (from 0) of sequence `sequence` in a list of sequences."""

    sequence: int
    residue: int


def residue_rows(packed: Packed, alphabet: Alphabet) -> Tensor:
    """Rows of the residues among the tokens: all but those that `alphabet` puts before and after each sequence."""
    keep = torch.ones(len(packed.tokens), dtype=torch.bool, device=packed.tokens.device)
    bounds = packed.cu_seqlens.long()
    for place in range(alphabet.before):
        keep[bounds[:-1] + place] = False
    for place in range(alphabet.after):
        keep[bounds[1:] - 1 - place] = False
    return keep.nonzero().squeeze(1)


def residue_vectors(model: MaskedLM, sequences: Sequence[str]) -> list[Tensor]:
    """(L, d) of the last layer for each of several cleaned sequences, packed; with gradients where they are wanted."""
    packed = model.pack_tokens([model.alphabet.encode(sequence) for sequence in sequences])
    return list(model(packed).last[residue_rows(packed, model.alphabet)].split(list(map(len, sequences))))


def refuse_overflow(values: NDArray[np.floating], protein: str, dtype: str) -> None:
    """Raise `InputError` unless what was computed of a batch, whose first protein is named, is finite."""
    if not np.isfinite(values).all():
        advice = "; the numbers of this model do not fit, use dtype float32" if dtype == "float16" else ""
        raise InputError(
            f"expected finite numbers from the model, got others in the batch from {protein} on, in {dtype}{advice}"
        )


def residue_predictions(model: MaskedLM, packed: Packed, encoded: Encoded, rows: Tensor) -> Predictions:
    """Surprise, entropy and rank of each residue from one pass, in which the model sees the residue itself."""
    return predictions(encoded.last[rows], model.logits, packed.tokens[rows], top=0)


def masked_predictions(
    model: MaskedLM,
    sequences: Sequence[NDArray[np.int64]],
    places: Sequence[ResidueIndex],
    attend: Attend | None = None,
) -> Predictions:
    """Surprise, entropy and rank (P,) of each residue when it alone is masked; as `masked_log_probabilities`."""
    hidden = _masked_hidden(model, sequences, places, attend)
    before = model.alphabet.before
    truth = [int(sequences[place.sequence][place.residue + before]) for place in places]
    return predictions(hidden, model.logits, torch.tensor(truth, device=hidden.device), top=0)


def masked_log_probabilities(
    model: MaskedLM,
    sequences: Sequence[NDArray[np.int64]],
    places: Sequence[ResidueIndex],
    attend: Attend | None = None,
) -> Tensor:
    """Log-probabilities (P, V) at each residue when it alone is masked: one copy of its sequence for each, packed.

    `sequences` are token numbers with start and end. Memory is linear in the copies' tokens, which the caller limits.
    """
    hidden = _masked_hidden(model, sequences, places, attend)
    return torch.cat([log_p for _, log_p in model.log_probabilities(hidden)])


def _masked_hidden(
    model: MaskedLM, sequences: Sequence[NDArray[np.int64]], places: Sequence[ResidueIndex], attend: Attend | None
) -> Tensor:
    """Vectors (P, d) of the last layer at each residue when it alone is masked."""
    copies = []
    before = model.alphabet.before
    for place in places:
        copy = sequences[place.sequence].copy()
        copy[place.residue + before] = model.alphabet.masked(int(copy[place.residue + before]))
        copies.append(copy)
    packed = model.pack_tokens(copies, [sequences[place.sequence] for place in places])
    inside = torch.tensor([place.residue + before for place in places], device=model.device)
    rows = packed.cu_seqlens[:-1].long() + inside
    return model(packed, attend=attend).last[rows]
