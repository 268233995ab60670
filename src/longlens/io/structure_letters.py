"""Structure letters (3Di) of proteins: from structures, by mini3di, or from a FASTA file of letters."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longlens.errors import InputError
from longlens.io.alphabet import clean_protein
from longlens.io.fasta import read_fasta
from longlens.io.structure_alphabet import LETTERS, UNKNOWN

STRUCTURES = (".pdb", ".ent", ".cif", ".mmcif")


def read_structure_letters(
    paths: Sequence[Path], proteins: Mapping[str, str], *, min_plddt: float | None = None
) -> dict[str, str]:
    """Cleaned sequence -> its letters, for each of `proteins` (id -> sequence).

    A folder stands for the structures in it. A structure serves the proteins whose sequence one of its chains has
    exactly; a FASTA file has the letters of a protein under its id. `min_plddt`: letters of residues whose B-factor,
    AlphaFold's pLDDT, is lower become `#` (SaProt takes 70).

    Raises `InputError` for a file that cannot be read, letters that do not fit, and proteins without any.
    """
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    found: dict[str, str] = {}
    for file in files:
        if file.suffix.lower() in STRUCTURES:
            found |= dict(_chains(file, min_plddt))
        elif file in paths:
            found |= _fasta(file, proteins)
    lacking = [name for name, sequence in proteins.items() if sequence not in found]
    if lacking:
        more = f" and {len(lacking) - 5:,} more" if len(lacking) > 5 else ""
        raise InputError(
            f"expected a structure of each protein, found none of {', '.join(lacking[:5])}{more}: a chain must have "
            "exactly the protein's residues, or a FASTA file of letters its id"
        )
    return {sequence: found[sequence] for sequence in proteins.values()}


def _fasta(path: Path, proteins: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for record in read_fasta(path):
        letters = record.sequence.strip().lower()
        if record.id not in proteins:
            continue
        if other := set(letters) - set(LETTERS):
            raise InputError(f"{record.place}: expected structure letters of {LETTERS}, got {', '.join(sorted(other))}")
        length = len(proteins[record.id])
        if len(letters) != length:
            raise InputError(f"{record.place}: expected {length} structure letters, got {len(letters)}")
        found[proteins[record.id]] = letters
    return found


def _chains(path: Path, min_plddt: float | None) -> Iterator[tuple[str, str]]:
    """Sequence and letters of each protein chain of the first model."""
    if importlib.util.find_spec("mini3di") is None:
        raise InputError("structure letters need the package mini3di: pip install 'longlens[structures]'")
    from Bio.Data.PDBData import protein_letters_3to1_extended as names
    from Bio.PDB.Chain import Chain
    from Bio.PDB.MMCIFParser import MMCIFParser
    from Bio.PDB.PDBExceptions import PDBConstructionException
    from Bio.PDB.PDBParser import PDBParser
    from mini3di import Encoder

    parser: Any = MMCIFParser(QUIET=True) if path.suffix.lower() in (".cif", ".mmcif") else PDBParser(QUIET=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chains = list(next(iter(parser.get_structure(path.stem, path))))
    except (OSError, ValueError, KeyError, StopIteration, PDBConstructionException) as error:
        raise InputError(f"{path}: expected a structure in PDB or mmCIF format; {error or 'it is empty'}") from None
    encoder = Encoder()
    for chain in chains:
        residues = [
            residue for residue in chain
            if "CA" in residue and (residue.id[0] == " " or residue.get_resname().strip() in names)
        ]  # fmt: skip
        if not residues:
            continue
        protein = Chain(chain.id)
        for residue in residues:
            protein.add(residue.copy())
        text = "".join(names.get(residue.get_resname().strip(), "X") for residue in residues)
        letters = encoder.build_sequence(encoder.encode_chain(protein)).lower()
        if min_plddt is not None:
            sure = [residue["CA"].get_bfactor() >= min_plddt for residue in residues]
            letters = "".join(letter if kept else UNKNOWN for letter, kept in zip(letters, sure, strict=True))
        yield clean_protein(text, f"{path.stem}_{chain.id}").sequence, letters
