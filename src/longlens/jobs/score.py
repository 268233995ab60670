"""Zero-shot effects of variants (Meier et al. 2021, doi 10.1101/2021.07.09.450648): what a model thinks of a mutation.

    wt-marginals       sum over mutations of log p(mutant | protein) - log p(wild type | protein), one pass
    masked-marginals   the same with the position masked, one mutation at a time
    pseudo-ppl         sum over all residues of the variant of log p(residue | the others): its pseudo-log-likelihood

For several mutations the terms are added. So the wild type, which has none, scores 0 by marginals; its pseudo-ppl is
the pseudo-log-likelihood of the protein itself, with which those of its variants are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from longlens.errors import SequenceError
from longlens.io.variants import Mutation
from longlens.jobs.inference import Place, masked_log_probabilities, residue_rows
from longlens.models.encoder import Attend
from longlens.models.language_model import MaskedLM

STRATEGIES = ("wt-marginals", "masked-marginals", "pseudo-ppl")


def refuse_unknown(model: MaskedLM, mutations: Sequence[Mutation], where: str) -> None:
    """Raise `SequenceError` where the model has no token for a residue: its score would be that of "unknown"."""
    for mutation in mutations:
        for residue in (mutation.wild, mutation.mutant):
            if model.alphabet.number(residue) == model.alphabet.unknown:
                raise SequenceError(
                    f"{where}: expected residues that {model.source} knows, got {residue}; leave it out"
                )


def score_variants(
    model: MaskedLM,
    sequence: str,
    variants: Sequence[tuple[Mutation, ...]],
    strategy: str = "masked-marginals",
    *,
    attend: Attend | None = None,
    budget: int = 16_384,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float64]:
    """One score for each variant; higher is better tolerated. `sequence` is cleaned. Formulas: the module's docstring.

    `budget` bounds the tokens of masked copies held at a time.
    """
    if strategy == "pseudo-ppl":
        return _pseudo_log_likelihoods(model, sequence, variants, attend, budget, report)
    positions = sorted({mutation.position for variant in variants for mutation in variant})
    table = position_log_probabilities(
        model, sequence, positions, masked=strategy == "masked-marginals", attend=attend, budget=budget, report=report
    )
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
    report: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float32]:
    """Log-probabilities (P, V) at positions of a protein, each hidden in turn, or all from one pass in sight."""
    tokens = model.alphabet.encode(sequence)
    with torch.inference_mode():
        if masked:
            parts = []
            for chunk in _chunks(positions, max(1, budget // len(tokens))):
                places = [Place(0, position) for position in chunk]
                parts.append(masked_log_probabilities(model, [tokens], places, attend).cpu().numpy())
                report(sum(map(len, parts)), len(positions))
            return np.concatenate(parts) if parts else np.empty((0, len(model.alphabet)), np.float32)
        packed = model.pack([sequence])
        hidden = model(packed, attend=attend).last[residue_rows(packed)]
        wanted = torch.tensor(list(positions), dtype=torch.int64, device=hidden.device)
        return torch.cat([log_p for _, log_p in model.log_probabilities(hidden[wanted])]).cpu().numpy()


def all_substitutions(
    model: MaskedLM, sequence: str, *, masked: bool, attend: Attend | None = None, budget: int = 16_384,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float32]:  # fmt: skip
    """(L, 20): score of each residue becoming each of `STANDARD`; 0 where it stays."""
    table = position_log_probabilities(
        model, sequence, range(len(sequence)), masked=masked, attend=attend, budget=budget, report=report
    )
    wild = np.array([model.alphabet.number(residue) for residue in sequence])
    return table[:, model.alphabet.standard] - np.take_along_axis(table, wild[:, None], 1)


def _pseudo_log_likelihoods(
    model: MaskedLM,
    sequence: str,
    variants: Sequence[tuple[Mutation, ...]],
    attend: Attend | None,
    budget: int,
    report: Callable[[int, int], None],
) -> NDArray[np.float64]:
    scores = np.zeros(len(variants))
    for number, variant in enumerate(variants):
        mutated = mutate(sequence, variant)
        table = position_log_probabilities(
            model, mutated, range(len(mutated)), masked=True, attend=attend, budget=budget
        )
        truth = model.alphabet.encode(mutated)[1:-1]
        scores[number] = np.take_along_axis(table, truth[:, None], 1).sum(dtype=np.float64)
        report(number + 1, len(variants))
    return scores


def mutate(sequence: str, variant: Sequence[Mutation]) -> str:
    """The protein with the mutations made."""
    residues = list(sequence)
    for mutation in variant:
        residues[mutation.position] = mutation.mutant
    return "".join(residues)


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
