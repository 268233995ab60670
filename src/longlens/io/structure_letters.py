"""Structure letters (3Di) of proteins: from structures, by mini3di, or from a FASTA file of letters."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longlens.errors import InputError
from longlens.io.chains import Residue, read_chains
from longlens.io.fasta import read_fasta
from longlens.io.structure_alphabet import LETTERS, UNKNOWN

STRUCTURES = (".pdb", ".ent", ".cif", ".mmcif")


@dataclass(frozen=True)
class _Found:
    """The letters of a sequence, the ids that name them, and where they are from, for messages."""

    sequence: str
    letters: str
    names: set[str]
    place: str


def read_structure_letters(
    paths: Sequence[Path], proteins: Mapping[str, str], *, min_plddt: float | None = None
) -> dict[str, str]:
    """Cleaned sequence -> its letters, for each of `proteins` (id -> sequence).

    A folder stands for the structures in it. A structure serves the proteins whose sequence one of its chains has
    exactly, in all (residues without atoms get `#`) or where it is resolved; a FASTA file has the letters of a protein
    under its id. Of several chains with the sequence the one that the protein's id names is taken (1abc_A, or 1abc of a
    file with one chain). `min_plddt`: letters of residues whose B-factor, AlphaFold's pLDDT, is lower become `#`
    (SaProt takes 70).

    Raises `InputError` for a file that cannot be read, letters that do not fit, proteins without any, and where one
    sequence has different letters, of which nothing says which are meant, or which two proteins have.
    """
    found: dict[str, list[_Found]] = {}
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.suffix.lower() in STRUCTURES:
                held = _of_structure(file, min_plddt)
            elif file == path:
                held = _of_fasta(file, proteins)
            else:
                continue
            for each in held:
                found.setdefault(each.sequence, []).append(each)
    lacking = [name for name, sequence in proteins.items() if sequence not in found]
    if lacking:
        more = f" and {len(lacking) - 5:,} more" if len(lacking) > 5 else ""
        raise InputError(
            f"expected a structure of each protein, found none of {', '.join(lacking[:5])}{more}: a chain must have "
            "exactly the protein's residues, or a FASTA file of letters its id"
        )
    chosen: dict[str, tuple[str, _Found]] = {}
    for name, sequence in proteins.items():
        mine = _chosen(name, found[sequence])
        other, theirs = chosen.setdefault(sequence, (name, mine))
        if theirs.letters != mine.letters:
            raise InputError(
                f"{other} and {name}: expected one structure of proteins that have the same sequence, got "
                f"{theirs.place} and {mine.place}, whose letters differ; give the two proteins in separate runs"
            )
    return {sequence: mine.letters for sequence, (_, mine) in chosen.items()}


def _chosen(name: str, found: list[_Found]) -> _Found:
    """The letters of a protein among those of its sequence."""
    named = [each for each in found if name in each.names] or found
    other = next((each for each in named if each.letters != named[0].letters), None)
    if other is not None:
        raise InputError(
            f"{name}: expected one structure, got {named[0].place} and {other.place}, whose letters differ; give one "
            "of them, or call the protein by the name of its chain (1abc_A)"
        )
    return named[0]


def _of_fasta(path: Path, proteins: Mapping[str, str]) -> Iterator[_Found]:
    for record in read_fasta(path):
        letters = record.sequence.strip().lower()
        if record.id not in proteins:
            continue
        if other := set(letters) - set(LETTERS):
            raise InputError(f"{record.place}: expected structure letters of {LETTERS}, got {', '.join(sorted(other))}")
        length = len(proteins[record.id])
        if len(letters) != length:
            raise InputError(f"{record.place}: expected {length} structure letters, got {len(letters)}")
        yield _Found(proteins[record.id], letters, {record.id}, record.place)


def _of_structure(path: Path, min_plddt: float | None) -> Iterator[_Found]:
    """The letters of each protein chain: of its resolved residues, and of its whole sequence where that is longer."""
    if importlib.util.find_spec("mini3di") is None:
        raise InputError("structure letters need the package mini3di: pip install 'longlens[structures]'")
    chains = read_chains(path)
    for chain in chains:
        letters = _letters(chain.resolved)
        if min_plddt is not None:
            letters = "".join(
                letter if residue.b_factor >= min_plddt else UNKNOWN
                for letter, residue in zip(letters, chain.resolved, strict=True)
            )
        names = chain.names(path) | ({path.name.split(".")[0]} if len(chains) == 1 else set())
        place = f"{path}, chain {chain.id}"
        yield _Found(chain.resolved_sequence, letters, names, place)
        if len(chain.sequence) > len(letters):
            known = {residue.place: letter for residue, letter in zip(chain.resolved, letters, strict=True)}
            whole = "".join(known.get(number, UNKNOWN) for number in range(len(chain.sequence)))
            yield _Found(chain.sequence, whole, names, place)


def _letters(residues: Sequence[Residue]) -> str:
    from mini3di import Encoder

    missing = np.full(3, np.nan)
    ca, cb, n, c = (
        np.array([residue.atoms.get(atom, missing) for residue in residues], np.float32)
        for atom in ("CA", "CB", "N", "C")
    )
    encoder = Encoder()
    letters: str = encoder.build_sequence(encoder.encode_atoms(ca, cb, n, c)).lower()
    return letters
