"""Masked language modelling: the choice of masked tokens, and the loss of predicting them (Devlin et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longlens.io.alphabet import Alphabet
from longlens.models.encoder import Attend, Packed
from longlens.models.language_model import MaskedLM


@dataclass(frozen=True)
class MaskedBatch:
    """Packed tokens of which some are masked, their positions (M,), and their original tokens (M,)."""

    packed: Packed
    places: Tensor
    truth: Tensor


def mask_tokens(
    packed: Packed, alphabet: Alphabet, generator: torch.Generator, rate: float = 0.15, *, all_masked: bool = False
) -> MaskedBatch:
    """Choose residues with probability `rate`; of these 80 % become <mask>, 10 % a random residue, 10 % stay.

    `all_masked`: all of them become <mask>, for measuring: a residue that stays visible is easy to predict.
    """
    tokens = packed.tokens
    standard = torch.from_numpy(alphabet.standard)
    # only the 20 standard residues are predicted
    residue = torch.isin(tokens, standard)
    draw = torch.rand(len(tokens), generator=generator)
    chosen = residue & (draw < rate)
    hidden = tokens.clone()
    hidden[chosen if all_masked else chosen & (draw < 0.8 * rate)] = alphabet.require_mask()
    swapped = chosen & (draw >= 0.9 * rate) & (not all_masked)
    strangers = standard[torch.randint(len(standard), (len(tokens),), generator=generator)]
    hidden = torch.where(swapped, strangers, hidden)
    places = chosen.nonzero().squeeze(1)
    return MaskedBatch(packed._replace(tokens=hidden), places, tokens[places])


def masked_loss(model: MaskedLM, masked: MaskedBatch, attend: Attend | None = None) -> Tensor:
    """Sum of the negative log-likelihoods of the masked tokens, in nats; logits are computed for these alone."""
    hidden = model(masked.packed, attend=attend).last[masked.places]
    return F.cross_entropy(model.logits(hidden).float(), masked.truth, reduction="sum")


@torch.no_grad()
def held_out_perplexity(
    model: MaskedLM, batches: Sequence[Packed], attend: Attend | None = None, seed: int = 0
) -> float:
    """exp of the mean negative log-likelihood over masked residues, 15 % of all, which `seed` chooses; in float32."""
    generator = torch.Generator().manual_seed(seed)
    total, count = 0.0, 0
    for packed in batches:
        masked = mask_tokens(packed, model.alphabet, generator, all_masked=True)
        total += masked_loss(model, masked, attend).item()
        count += len(masked.truth)
    return math.exp(total / max(1, count))
