"""Proteins with known contacts: from structures (PDB, mmCIF), or from tables of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError, SequenceError
from longlens.io.alphabet import clean_protein
from longlens.io.chains import read_chains
from longlens.io.delimited import read_delimited
from longlens.io.fasta import read_fasta

# C-beta atoms closer than this, in Angstrom, are in contact (CASP; Rao et al. 2020)
CONTACT = 8.0


@dataclass(frozen=True)
class ProteinContacts:
    """A protein and its pairs in contact, (M, 2) with i < j, from 0."""

    id: str
    sequence: str
    contacts: NDArray[np.int64]


def read_structure(path: Path) -> Iterator[ProteinContacts]:
    """The resolved residues of each protein chain of the first model (`longlens.io.chains`), and their contacts by
    C-beta (glycine: C-alpha).

    Raises `InputError` for a file that cannot be read or holds no protein.
    """
    for chain in read_chains(path):
        coordinates = np.array([residue.coordinate for residue in chain.resolved], np.float64)
        yield ProteinContacts(f"{path.stem}_{chain.id}", chain.resolved_sequence, close_pairs(coordinates))


def read_pairs(paths: Sequence[Path], fasta: Path) -> list[ProteinContacts]:
    """Contacts from tables with the columns id, i, j (from 1), of proteins of a FASTA file.

    Raises `InputError` for a file that cannot be read, and missing columns, ids or residues; the message gives the
    line.
    """
    proteins = {record.id: clean_protein(record.sequence, record.place).sequence for record in read_fasta(fasta)}
    pairs: dict[str, set[tuple[int, int]]] = {}
    for path in paths:
        table = read_delimited(path)
        table.require(("id", "i", "j"))
        for number, row in enumerate(table.rows):
            where = table.place(number)
            if row["id"] not in proteins:
                raise InputError(f"{where}: expected a protein of {fasta}, got {row['id']!r}")
            length = len(proteins[row["id"]])
            try:
                i, j = sorted((int(row["i"]), int(row["j"])))
            except ValueError:
                raise InputError(f"{where}: expected residue numbers, got {row['i']!r}, {row['j']!r}") from None
            if not 1 <= i < j <= length:
                raise SequenceError(f"{where}: expected two residues in 1..{length}, got {i} and {j}")
            pairs.setdefault(row["id"], set()).add((i - 1, j - 1))
    return [ProteinContacts(name, proteins[name], np.array(sorted(found), np.int64)) for name, found in pairs.items()]


def close_pairs(coordinates: NDArray[np.float64]) -> NDArray[np.int64]:
    """Pairs i < j nearer than `CONTACT`, by a tree: no T x T matrix."""
    from Bio.PDB.kdtrees import KDTree

    neighbours = KDTree(np.ascontiguousarray(coordinates), 10).neighbor_search(CONTACT)
    pairs = [tuple(sorted((pair.index1, pair.index2))) for pair in neighbours if pair.radius < CONTACT]
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)
