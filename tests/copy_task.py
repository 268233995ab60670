"""A model that was trained to copy: what carried its prediction is known by construction.

A protein of 20 residues in five stretches of 4. One of the first four stretches begins with W, and the last residue is
the one that follows this W. All others are drawn at random from eight.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

import longlens
from longlens.jobs.context_protein import HidingAttend
from longlens.models.encoder import EncoderConfig, pack
from longlens.models.language_model import MaskedLM

LENGTH, WIDTH = 20, 4
SPANS = [(start, start + WIDTH) for start in range(1, LENGTH - WIDTH + 1, WIDTH)]
LETTERS = "ADEGIKLS"
BATCH, STEPS = 64, 400


def draw(rng: np.random.Generator, count: int) -> list[tuple[str, int]]:
    """Proteins, and the stretch of `SPANS` that the last residue is copied from."""
    out = []
    for _ in range(count):
        residues = [LETTERS[number] for number in rng.integers(0, len(LETTERS), LENGTH)]
        stretch = int(rng.integers(0, len(SPANS)))
        residues[WIDTH * stretch] = "W"
        residues[-1] = residues[WIDTH * stretch + 1]
        out.append(("".join(residues), stretch))
    return out


def untrained(seed: int = 0) -> MaskedLM:
    """The model before training."""
    torch.manual_seed(seed)
    config = EncoderConfig(vocabulary=33, layers=2, width=48, heads=2, feed_forward=64, token_dropout=False)
    model = MaskedLM(config, longlens.load("tiny").alphabet, contacts=False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.0 if "embedding" in name else parameter.shape[1] ** -0.5)
    return model.requires_grad_(False)


def trained(seed: int = 0) -> MaskedLM:
    """The model after some hundred steps, which predicts the copied residue nearly always."""
    model = untrained(seed).requires_grad_(True)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(STEPS):
        tokens = np.stack([model.alphabet.encode(sequence) for sequence, _ in draw(rng, BATCH)])
        truth = torch.from_numpy(tokens[:, LENGTH].copy())
        tokens[:, LENGTH] = model.alphabet.mask
        hidden = model(pack(tokens), attend=HidingAttend(BATCH)).last.view(BATCH, LENGTH + 2, -1)[:, LENGTH]
        loss = F.cross_entropy(model.logits(hidden), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.03:
            break
    return model.requires_grad_(False)
