"""Precision of predicted contacts by range, as CASP measures it: of the L, L/2 and L/5 most probable pairs of a range
of separations, the share whose C-beta atoms are less than 8 Angstrom apart in the structure.

Residues without atoms are left out of both sides: of the predicted pairs, and of the contacts. Pairs with equal
probabilities count as the expectation over their orders. A pair that a prediction does not hold is one that it does not
predict: where fewer pairs than asked for are there, the others count as no contacts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.io.chains import Chain
from longlens.io.structures import close_pairs
from longlens.jobs.contact_precision import expected_precision

# name -> least and most residues between the two of a pair, as j - i
RANGES = {"short": (6, 11), "medium": (12, 23), "long": (24, None)}
CUTS = {"L": 1, "L/2": 2, "L/5": 5}


@dataclass(frozen=True)
class RangePrecision:
    """Of the `count` most probable pairs in a range, `held` of which the prediction has. `chance` is the share of
    contacts among all pairs of the range, which is the precision of a random guess."""

    range: str
    cut: str
    count: int
    held: int
    precision: float
    contacts: int
    chance: float


def precision_by_range(
    pairs: Iterable[dict[str, NDArray[Any]]], places: NDArray[np.int64], chain: Chain, length: int
) -> list[RangePrecision]:
    """The precision in each range that has contacts, and for each cut.

    Args:
        pairs: parts of a prediction: "i", "j" (from 1), "probability". Each part is dropped when it has been read.
        places: (N,) the place of each residue of the prediction in the chain's sequence, -1 where there is none.
        chain: the structure's chain.
        length: L.
    """
    resolved = chain.resolved
    where = np.array([residue.place for residue in resolved], np.int64)
    have = np.zeros(len(chain.sequence), bool)
    have[where] = True
    contacts = np.sort(where[close_pairs(np.array([residue.coordinate for residue in resolved]))], 1)
    best = {name: _Strongest(2 * length) for name in RANGES}
    for part in pairs:
        i, j = (places[part[name].astype(np.int64) - 1] for name in ("i", "j"))
        known = (i >= 0) & (j >= 0)
        known[known] = have[i[known]] & have[j[known]]
        i, j, probability = i[known], j[known], part["probability"][known].astype(np.float64)
        i, j = np.minimum(i, j), np.maximum(i, j)
        for name in RANGES:
            inside = _inside(j - i, name)
            best[name].add(i[inside] * len(chain.sequence) + j[inside], probability[inside])
    found = []
    for name in RANGES:
        true = contacts[_inside(contacts[:, 1] - contacts[:, 0], name)]
        if len(true):
            codes = true[:, 0] * len(chain.sequence) + true[:, 1]
            found += _cuts(name, best[name], codes, _pairs_of_range(have, name), length)
    return found


def _cuts(name: str, best: _Strongest, contacts: NDArray[np.int64], possible: int, length: int) -> list[RangePrecision]:
    codes, probability = best.pairs()
    truth = np.isin(codes, contacts)
    rows = []
    for cut, part in CUTS.items():
        # a short chain has fewer pairs in a range than L
        count = min(max(1, length // part), possible)
        held = min(count, len(codes))
        share = expected_precision(probability, truth, np.ones(len(codes)), count) * held / count if held else 0.0
        rows.append(RangePrecision(name, cut, count, held, share, len(contacts), len(contacts) / possible))
    return rows


class _Strongest:
    """The most probable of pairs that come in parts: at least `count`, and all that are equal to the last of them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.codes: NDArray[np.int64] = np.empty(0, np.int64)
        self.probability: NDArray[np.float64] = np.empty(0)

    def add(self, codes: NDArray[np.int64], probability: NDArray[np.float64]) -> None:
        self.codes = np.concatenate([self.codes, codes])
        self.probability = np.concatenate([self.probability, probability])
        if len(self.codes) > 2 * self.count:
            # each pair may be there twice, from either side
            least = np.partition(self.probability, -self.count)[-self.count]
            keep = self.probability >= least
            self.codes, self.probability = self.codes[keep], self.probability[keep]

    def pairs(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Each pair once."""
        codes, first = np.unique(self.codes, return_index=True)
        return codes, self.probability[first]


def _inside(separation: NDArray[np.int64], name: str) -> NDArray[np.bool_]:
    least, most = RANGES[name]
    inside: NDArray[np.bool_] = separation >= least
    return inside if most is None else inside & (separation <= most)


def _pairs_of_range(have: NDArray[np.bool_], name: str) -> int:
    """The number of pairs of residues with atoms in a range, by counting partners ahead of each."""
    least, most = RANGES[name]
    before = np.concatenate([[0], np.cumsum(have)])
    start = np.minimum(np.flatnonzero(have) + least, len(have))
    stop = len(have) if most is None else np.minimum(np.flatnonzero(have) + most + 1, len(have))
    return int((before[stop] - before[start]).sum())
