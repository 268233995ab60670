"""Which proteins are alike, how they are divided, and what training protein each held-out one is nearest to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.finetuning.similarity import Neighbour, greedy_clusters, nearest
from longlens.finetuning.splits import ALIKE, TWINS, Leaks, Split, count_leaks, make_split
from longlens.finetuning.targets import Targets


@dataclass(frozen=True)
class Comparison:
    """`clusters` (P,), the sets, and for each validation and test protein its nearest training protein."""

    clusters: NDArray[np.int64]
    split: Split
    neighbours: dict[int, Neighbour]

    @classmethod
    def make(
        cls, sequences: Sequence[str], given: Sequence[str], kind: str, clusters: NDArray[np.int64] | None, seed: int,
        step: Callable[[int], None],
    ) -> Comparison:  # fmt: skip
        """Compare proteins and divide them as `make_split` does. `clusters`: None to make them."""
        if clusters is None:
            clusters = greedy_clusters(sequences, ALIKE, step)
        split = make_split(kind, given, clusters, seed)
        held_out = split.members("validation") + split.members("test")
        found = nearest(sequences, held_out, split.members("train"))
        return cls(clusters, split, dict(zip(held_out, found, strict=True)))

    def leaks(self) -> dict[str, Leaks]:
        """How alike the validation and the test proteins are to training proteins."""
        names = ("validation", "test")
        return {name: count_leaks([self.neighbours[number] for number in self.split.members(name)]) for name in names}

    def warnings(self) -> list[str]:
        """A sentence for a random split, and one for each set that leaks."""
        leaks = self.leaks()
        sentences = [found.sentence(name, self.split.kind) for name, found in leaks.items()]
        if self.split.kind == "random":
            twins = " and ".join(f"{found.near_twins:,} of {found.proteins:,} {name}" for name, found in leaks.items())
            sentences.insert(
                0,
                f"the split is random, so similar proteins fall on both sides of it: {twins} proteins are near twins "
                f"of training proteins ({TWINS:.0%} or more identical); --split clusters keeps them together",
            )
        return [sentence for sentence in sentences if sentence]

    def as_json(self) -> bytes:
        """The content of a file."""
        found = [[number, neighbour.number, neighbour.identity] for number, neighbour in self.neighbours.items()]
        entries: dict[str, Any] = {
            "clusters": self.clusters.tolist(), "sets": self.split.sets, "kind": self.split.kind, "nearest": found,
        }  # fmt: skip
        return json.dumps(entries).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Comparison:
        """What `as_json` wrote."""
        entries = json.loads(data)
        neighbours = {number: Neighbour(other, identity) for number, other, identity in entries["nearest"]}
        return cls(np.array(entries["clusters"], np.int64), Split(tuple(entries["sets"]), entries["kind"]), neighbours)


def refuse_missing(split: Split, targets: Targets) -> None:
    """Raise `InputError` for a set without known targets, and for a class without training proteins."""
    for name in ("train", "validation", "test"):
        values = np.concatenate([targets.values[number] for number in split.members(name)])
        known = np.unique(values[~np.isnan(values)])
        if not len(known):
            raise InputError(f"expected known targets in the {name} set, got none")
        missing = [text for number, text in enumerate(targets.classes) if number not in known]
        if name == "train" and missing:
            raise InputError(
                f"expected every class among the training proteins, got none of {', '.join(missing)} ({split.kind} "
                "split); divide otherwise: another --seed, or SET in the file"
            )
