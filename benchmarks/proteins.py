"""Proteins for the benchmarks: a sample that represents a FASTA file, the same for everyone who has the file and seed.

    python benchmarks/proteins.py PROTEINS.fasta.gz [--rounds 6] [--groups 4] [--seed 0]     lists the sample

The sample is stratified over length. All proteins of the file are put in order of length and cut into as many strata of
equal count as there are groups in all rounds; each stratum gives one group of `GROUP` neighbours: of `TRIES` random
places the one whose mean length is nearest to the stratum's. Neighbours in length are what a program that sorts the
whole file would batch together, so a padded batch that is made of one group has the little padding of a sorted file.
Each round gets one group of every part of the distribution, so that it holds short and long proteins; all rounds
together represent the file.
"""

from __future__ import annotations

import argparse
import gzip
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

GROUP = 8  # proteins to a group, and to a padded batch
TRIES = 32  # places in a stratum; with one alone the few longest proteins would decide the sample's mean


class Protein(NamedTuple):
    """The name in the file, and the residues."""

    id: str
    sequence: str


def read(fasta: Path) -> list[Protein]:
    """All proteins of a FASTA file, plain or gzipped, upper case, without stops."""

    def records() -> Iterator[Protein]:
        name, parts = "", list[str]()
        with gzip.open(fasta, "rt") if fasta.suffix == ".gz" else fasta.open() as lines:
            for line in lines:
                if line.startswith(">"):
                    if name:
                        yield Protein(name, "".join(parts))
                    name, parts = (line[1:].split() or ["unnamed"])[0], []
                else:
                    parts.append(line.strip().upper().rstrip("*"))
        if name:
            yield Protein(name, "".join(parts))

    return [record for record in records() if record.sequence]


def draw(proteins: Sequence[Protein], rounds: int, groups: int, seed: int = 0) -> list[list[list[Protein]]]:
    """The sample: for every round, `groups` groups of `GROUP` proteins (see the module's docstring).

    Raises:
        ValueError: fewer proteins than the sample would have.
    """
    strata = rounds * groups
    if len(proteins) < strata * GROUP:
        raise ValueError(
            f"expected at least {strata * GROUP} proteins for {rounds} rounds of {groups} groups of {GROUP}, got "
            f"{len(proteins)}; ask for fewer rounds or groups"
        )
    # the order in the file does not count, nor do ties in length
    ordered = sorted(proteins, key=lambda protein: (len(protein.sequence), protein.id, protein.sequence))
    chance = random.Random(seed)
    sample: list[list[list[Protein]]] = [[] for _ in range(rounds)]
    for part in range(groups):
        # the strata of one part of the distribution go to the rounds by chance
        order = list(range(rounds))
        chance.shuffle(order)
        for place, turn in enumerate(order):
            number = part * rounds + place
            first, last = number * len(ordered) // strata, (number + 1) * len(ordered) // strata
            stratum = ordered[first:last]
            starts = [chance.randrange(len(stratum) - GROUP + 1) for _ in range(TRIES)]
            groups_there = [stratum[start : start + GROUP] for start in starts]
            middle = mean_length(stratum)
            sample[turn].append(min(groups_there, key=lambda group: abs(mean_length(group) - middle)))
    return sample


def mean_length(proteins: Sequence[Protein]) -> float:
    """Residues to a protein."""
    return statistics.fmean(len(protein.sequence) for protein in proteins)


def describe(sample: Sequence[Sequence[Sequence[Protein]]], whole: Sequence[Protein]) -> dict[str, object]:
    """Counts and lengths of the sample beside those of the file, for results and titles."""

    def lengths(proteins: Sequence[Protein]) -> dict[str, float]:
        sizes = sorted(len(protein.sequence) for protein in proteins)
        return {
            "proteins": len(sizes), "residues": sum(sizes), "mean": round(statistics.fmean(sizes), 1),
            "median": statistics.median(sizes), "longest": sizes[-1],
            # the length of the protein in which a residue stands: what attention costs for each residue
            "mean_over_residues": round(sum(n * n for n in sizes) / sum(sizes), 1),
        }  # fmt: skip

    flat = [protein for turn in sample for group in turn for protein in group]
    return {"sample": lengths(flat), "file": lengths(whole), "rounds": len(sample), "group": GROUP}


def joined(fasta: Path, residues: int) -> str:
    """Real proteins, one after the other, cut to a length."""
    text = ""
    for protein in read(fasta):
        text += protein.sequence
        if len(text) >= residues:
            return text[:residues]
    raise SystemExit(f"expected {residues} residues in {fasta}, found {len(text)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    whole = read(chosen.fasta)
    sample = draw(whole, chosen.rounds, chosen.groups, chosen.seed)
    for number, turn in enumerate(sample):
        for protein in (protein for group in turn for protein in group):
            print(number, protein.id, len(protein.sequence), sep="\t")
    print(describe(sample, whole))


if __name__ == "__main__":
    main()
