"""Crops of proteins, packed into steps; the stream continues exactly where a checkpoint was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longlens.errors import InputError, SequenceError
from longlens.io.alphabet import Alphabet
from longlens.io.survey import read_cleaned
from longlens.models.encoder import Packed, pack


def encode_files(paths: Sequence[Path], alphabet: Alphabet) -> list[NDArray[np.int16]]:
    """The tokens of every protein in FASTA files. Raises `SequenceError` if there are none."""
    proteins = [alphabet.encode(sequence).astype(np.int16) for sequence in read_cleaned(paths)]
    if not proteins:
        raise SequenceError(f"expected proteins in {', '.join(map(str, paths))}, found none")
    return proteins


def all_crops(proteins: Sequence[NDArray[np.int16]], crop: int, tokens: int, *, joined: bool = False) -> list[Packed]:
    """All proteins in order, cut into crops as in training, packed to at most `tokens` in a step."""
    steps: list[list[NDArray[np.int64]]] = [[]]
    for part in [np.concatenate(list(proteins))] if joined else proteins:
        for start in range(0, len(part), crop):
            piece = part[start : start + crop].astype(np.int64)
            if steps[-1] and sum(map(len, steps[-1])) + len(piece) > tokens:
                steps.append([])
            steps[-1].append(piece)
    return [pack(step) for step in steps]


def crop_fits(crop: int, tokens: int) -> bool:
    """Whether crops of so many tokens can fill a step of so many."""
    return 8 <= crop <= tokens


class Crops:
    """An endless, shuffled stream of crops of at most `crop` tokens, packed to about `tokens` in a step.

    `joined`: crops are cut from concatenated proteins and attend across their borders, so that every crop is `crop`
    tokens long; otherwise each protein is a separate sequence, of which a random part is used if it is longer.
    """

    def __init__(
        self, proteins: Sequence[NDArray[np.int16]], crop: int, tokens: int, seed: int, *, joined: bool = False
    ) -> None:
        if not crop_fits(crop, tokens):
            raise InputError(f"expected 8 <= crop <= tokens in a step, got crop {crop} and {tokens} tokens")
        self.proteins, self.crop, self.tokens, self.seed, self.joined = proteins, crop, tokens, seed, joined
        self.epoch = self.place = 0
        self._left = np.empty(0, np.int16)
        self._order = self._shuffle()

    def next_step(self) -> Packed:
        """The next step's crops."""
        if self.joined:
            return pack(self._joined_crop().astype(np.int64) for _ in range(self.tokens // self.crop))
        crops: list[NDArray[np.int64]] = []
        room = self.tokens
        while room > 0:
            piece = self._cut(self._next_protein(), min(self.crop, max(room, 8)))
            crops.append(piece.astype(np.int64))
            room -= len(piece)
        return pack(crops)

    def state_dict(self) -> dict[str, Any]:
        """The state from which `load_state_dict` continues."""
        return {"epoch": self.epoch, "place": self.place, "left": torch.from_numpy(self._left.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.epoch, self.place, self._left = state["epoch"], state["place"], state["left"].numpy()
        self._order = self._shuffle()

    def _shuffle(self) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.proteins))

    def _next_protein(self) -> NDArray[np.int16]:
        if self.place == len(self._order):
            self.epoch, self.place = self.epoch + 1, 0
            self._order = self._shuffle()
        self.place += 1
        return self.proteins[self._order[self.place - 1]]

    def _cut(self, protein: NDArray[np.int16], most: int) -> NDArray[np.int16]:
        # start and end tokens are only at a protein's true ends, as ESM-2 was trained
        spare = len(protein) - most
        if spare <= 0:
            return protein
        start = int(np.random.default_rng((self.seed, self.epoch, self.place)).integers(spare + 1))
        return protein[start : start + most]

    def _joined_crop(self) -> NDArray[np.int16]:
        parts, count = [self._left], len(self._left)
        while count < self.crop:
            parts.append(self._next_protein())
            count += len(parts[-1])
        whole = np.concatenate(parts)
        self._left = whole[self.crop :]
        return whole[: self.crop]
