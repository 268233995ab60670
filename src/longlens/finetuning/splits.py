"""Which proteins are trained on, which choose, which measure; and how alike training and held-out proteins are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError, SequenceError
from longlens.finetuning.similarity import Neighbour

SETS = ("train", "validation", "test")
# shares of the proteins, where the file does not divide them
SHARES = (0.7, 0.15, 0.15)
KINDS = ("auto", "given", "clusters", "random")
# proteins of this identity or more are of one family
ALIKE = 0.3
# and of this one near twins
TWINS = 0.9
# the bounds of the histogram of nearest-training identities
BOUNDS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)


@dataclass(frozen=True)
class Split:
    """`sets` has the set of each protein; `kind` says how they were divided: "given", "clusters", "random"."""

    sets: tuple[str, ...]
    kind: str

    def members(self, name: str) -> list[int]:
        """The numbers of a set's proteins."""
        return [number for number, which in enumerate(self.sets) if which == name]


def choose_kind(kind: str, given: Sequence[str]) -> str:
    """What "auto" means: the given sets where there are any, clusters otherwise.

    Raises `InputError` for an unknown kind and for "given" where the file divides nothing.
    """
    if kind not in KINDS:
        raise InputError(f"expected a split of {', '.join(KINDS)}, got {kind!r}")
    if kind == "auto":
        return "given" if any(given) else "clusters"
    if kind == "given" and not any(given):
        raise InputError(
            "expected SET=train and SET=test in the file, since the split is to be the given one; got none"
        )
    return kind


def make_split(kind: str, given: Sequence[str], clusters: NDArray[np.int64], seed: int) -> Split:
    """Divide the proteins. Raises `InputError` where a set would be empty.

    A given split without a validation set gets one from its training proteins, by cluster.
    """
    if kind == "given":
        sets = list(given)
        for name in ("train", "test"):
            if name not in sets:
                raise InputError(
                    f"expected proteins of SET={name}, got none ({_counts(sets)}); give some, or divide by similarity "
                    "with --split clusters"
                )
        if "validation" not in sets:
            training = [number for number, name in enumerate(sets) if name == "train"]
            parts = _deal(clusters[training], (0.85, 0.15), seed)
            for number, part in zip(training, parts, strict=True):
                sets[number] = ("train", "validation")[part]
    elif kind == "random":
        sets = [SETS[part] for part in _deal(np.arange(len(given)), SHARES, seed)]
    else:
        sets = [SETS[part] for part in _deal(clusters, SHARES, seed)]
    empty = [name for name in SETS if name not in sets]
    if empty:
        raise InputError(
            f"expected proteins for training, validation and test, got none for {' and '.join(empty)}: the "
            f"{len(given):,} proteins form {len(set(clusters.tolist())):,} clusters; add more diverse proteins, or "
            "divide them yourself by SET"
        )
    return Split(tuple(sets), kind)


def _counts(sets: Sequence[str]) -> str:
    return ", ".join(f"{sets.count(name)} {name}" for name in SETS)


def _deal(clusters: NDArray[np.int64], shares: Sequence[float], seed: int) -> list[int]:
    """The part of each protein. Clusters go whole, the largest first (equal ones in random order), to the part that
    lacks most of its share."""
    names, sizes = np.unique(clusters, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled = np.zeros(len(shares))
    wanted = np.array(shares) * len(clusters)
    part_of = {}
    for place in order.tolist():
        part = int(np.argmax((wanted - filled) / wanted if filled.all() else np.where(filled == 0, wanted, 0)))
        part_of[int(names[place])] = part
        filled[part] += sizes[place]
    return [part_of[int(name)] for name in clusters]


def read_clusters(path: Path, ids: Sequence[str]) -> NDArray[np.int64]:
    """(P,): a number for each protein's cluster, from a table of representative and member, as MMseqs2 writes it.

    Raises `SequenceError` for a file that cannot be read, a line without two names, and a protein that it lacks.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SequenceError(f"{path}: expected MMseqs2's table of clusters ({error})") from None
    representatives: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != 2:
            raise SequenceError(
                f"{path}, line {number}: expected a representative and a member, as in MMseqs2's _cluster.tsv, got "
                f"{line[:60]!r}"
            )
        representatives[cells[1]] = cells[0]
    missing = [name for name in ids if name not in representatives]
    if missing:
        raise SequenceError(
            f"{path}: expected every protein in a cluster, {len(missing):,} are not, the first {missing[0]!r}"
        )
    numbers = {name: number for number, name in enumerate(sorted(set(representatives.values())))}
    return np.array([numbers[representatives[name]] for name in ids], np.int64)


@dataclass(frozen=True)
class Leaks:
    """How many proteins of a set have a nearest training protein of each identity; `counts` between `BOUNDS`."""

    proteins: int
    alike: int
    near_twins: int
    counts: tuple[int, ...]

    def sentence(self, name: str, kind: str) -> str:
        """A warning, where any protein is alike; empty otherwise."""
        if not self.alike:
            return ""
        listed = ", ".join(
            f"{low:.0%} to {high:.0%}: {count:,}"
            for low, high, count in zip(BOUNDS, BOUNDS[1:], self.counts, strict=False)
        )
        return (
            f"{self.alike:,} of {self.proteins:,} {name} proteins are {ALIKE:.0%} or more identical to a training "
            f"protein, {self.near_twins:,} of them {TWINS:.0%} or more, so that measures on them are too good for "
            f"new families ({kind} split; nearest training identity {listed})"
        )


def count_leaks(neighbours: Sequence[Neighbour]) -> Leaks:
    """The histogram of identities to the nearest training protein."""
    identities = np.array([neighbour.identity for neighbour in neighbours])
    counts, _ = np.histogram(identities, BOUNDS)
    alike, twins = (int((identities >= bound).sum()) for bound in (ALIKE, TWINS))
    return Leaks(len(neighbours), alike, twins, tuple(int(count) for count in counts))
