"""Formulas of zero-shot variant effects (Meier et al. 2021, doi 10.1101/2021.07.09.450648) from a model's predictions.

    wt-marginals       sum over mutations of log p(mutant | protein) - log p(wild type | protein), one pass
    masked-marginals   the same with the position masked, one mutation at a time
    pseudo-ppl         sum over all residues of the variant of log p(residue | the others): its pseudo-log-likelihood

For several mutations the terms are added. So the wild type, which has none, scores 0 by marginals; its pseudo-ppl is
the pseudo-log-likelihood of the protein itself, with which those of its variants are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longlens.errors import SequenceError
from longlens.io.variants import Mutation
from longlens.jobs.inference import ResidueIndex, masked_log_probabilities, residue_rows
from longlens.models.encoder import Attend
from longlens.models.language_model import MaskedLM

STRATEGIES = ("wt-marginals", "masked-marginals", "pseudo-ppl")


def refuse_unknown(model: MaskedLM, mutations: Sequence[Mutation], where: str) -> None:
    """Raise `SequenceError` if the model has no token for a residue, whose score would be that of "unknown"."""
    for mutation in mutations:
        for residue in (mutation.wild, mutation.mutant):
            if model.alphabet.number(residue) == model.alphabet.unknown:
                raise SequenceError(
                    f"{where}: expected residues that {model.source} knows, got {residue}; leave it out"
                )


def marginal_scores(
    model: MaskedLM,
    table: NDArray[Any],
    positions: Sequence[int],
    variants: Sequence[tuple[Mutation, ...]],
) -> NDArray[np.float64]:
    """One score for each variant from log-probabilities (P, V) at `positions`; higher is better tolerated."""
    row = {position: number for number, position in enumerate(positions)}
    number = model.alphabet.number
    return np.array([
        sum(
            table[row[m.position], number(m.mutant)] - table[row[m.position], number(m.wild)] for m in variant
        )
        for variant in variants
    ], dtype=np.float64)  # fmt: skip


def position_log_probabilities(
    model: MaskedLM,
    sequence: str,
    positions: Sequence[int],
    *,
    masked: bool,
    attend: Attend | None = None,
    budget: int = 16_384,
) -> NDArray[np.float32]:
    """Log-probabilities (P, V) at positions of a protein, each masked in turn, or all from one pass without masking.

    `sequence` is cleaned; `budget` is the most tokens of masked copies that are held at a time.
    """
    tokens = model.alphabet.encode(sequence)
    with torch.inference_mode():
        if masked:
            parts = []
            for chunk in _chunks(positions, max(1, budget // len(tokens))):
                places = [ResidueIndex(0, position) for position in chunk]
                parts.append(masked_log_probabilities(model, [tokens], places, attend).cpu().numpy())
            whole = np.concatenate(parts) if parts else np.empty((0, len(model.alphabet)), np.float32)
            return model.alphabet.by_residue(whole)
        packed = model.pack([sequence])
        hidden = model(packed, attend=attend).last[residue_rows(packed, model.alphabet)]
        indices = torch.tensor(list(positions), dtype=torch.int64, device=hidden.device)
        log_p = torch.cat([part for _, part in model.log_probabilities(hidden[indices])])
        return model.alphabet.by_residue(log_p.cpu().numpy())


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
