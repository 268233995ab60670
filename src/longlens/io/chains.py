"""The protein chains of a structure (PDB, mmCIF): their whole sequences, and where their resolved residues belong.

The whole sequence is that of the molecule in the experiment: `_entity_poly_seq` of mmCIF, SEQRES of PDB. Residues are
placed by `label_seq_id`, or, in a PDB file, by their numbers or an alignment, never by their order among the atoms.
Without a whole sequence the resolved residues are all that is known, and `Chain.whole` is False.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.alignment import aligned_pairs
from longlens.io.alphabet import clean_protein

CIF = (".cif", ".mmcif")
# atoms that are read
ATOMS = ("N", "CA", "C", "CB")


@dataclass(frozen=True)
class Residue:
    """A residue with atoms: its place in the chain's sequence (from 0), its number and insertion code as authors and
    viewers give it, those of `ATOMS` that it has, (3,) in Angstrom, and the B-factor of its C-alpha atom, NaN without
    one; AlphaFold and its kin write the pLDDT there. Of several positions of an atom the first is taken."""

    place: int
    number: str
    atoms: dict[str, NDArray[np.float64]]
    b_factor: float

    @property
    def coordinate(self) -> NDArray[np.float64] | None:
        """The C-beta atom (glycine, and where there is none: C-alpha), or None without either."""
        return self.atoms.get("CB", self.atoms.get("CA"))


@dataclass(frozen=True)
class Chain:
    """A protein chain of the first model. `id` is the chain's name in viewers (`auth_asym_id`)."""

    id: str
    sequence: str
    residues: list[Residue]
    whole: bool

    @cached_property
    def resolved(self) -> list[Residue]:
        """The residues with a C-alpha or C-beta atom."""
        return [residue for residue in self.residues if residue.coordinate is not None]

    @property
    def resolved_sequence(self) -> str:
        """The letters of `resolved`."""
        return "".join(self.sequence[residue.place] for residue in self.resolved)

    def names(self, path: Path) -> set[str]:
        """The ids by which a protein may name this chain of a file: 1abc_A, 1abcA, 1abc:A."""
        stem = path.name.split(".")[0]
        return {f"{stem}_{self.id}", f"{stem}{self.id}", f"{stem}:{self.id}"}


@dataclass
class _Found:
    """A residue as its atoms are read."""

    name: str
    number: str
    label: str
    # x, y, z and B-factor of those of `ATOMS` that it has
    atoms: dict[str, tuple[str, str, str, str]]

    def see(self, atom: str, values: tuple[str, str, str, str]) -> None:
        """Take in an atom, unless it is there already."""
        if atom in ATOMS:
            self.atoms.setdefault(atom, values)


def read_chains(path: Path) -> list[Chain]:
    """The protein chains of a structure.

    Raises `InputError` for a file that cannot be read, or holds no protein.
    """
    try:
        chains = _cif_chains(path) if path.suffix.lower() in CIF else _pdb_chains(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: expected a structure in PDB or mmCIF format; {error or 'it is empty'}") from None
    if not chains:
        raise InputError(f"{path}: expected a protein, found no residue with a C-alpha atom")
    return chains


def read_cif(path: Path) -> dict[str, list[str]]:
    """The items of an mmCIF file."""
    from Bio.PDB.MMCIF2Dict import MMCIF2Dict

    return dict(MMCIF2Dict(path))


def _cif_chains(path: Path) -> list[Chain]:
    items = read_cif(path)
    wanted = ("label_asym_id", "auth_asym_id", "auth_seq_id", "label_comp_id", "label_atom_id")
    columns: list[Sequence[str]] = [items[f"_atom_site.{name}"] for name in wanted]
    count = len(columns[0])
    for name, default in (("label_seq_id", "?"), ("pdbx_PDB_ins_code", "?"), ("pdbx_PDB_model_num", "1"),
                          ("label_entity_id", "?")):  # fmt: skip
        columns.append(items.get(f"_atom_site.{name}", [default] * count))
    b_factors = items.get("_atom_site.B_iso_or_equiv", ["nan"] * count)
    places = zip(*(items[f"_atom_site.Cartn_{axis}"] for axis in "xyz"), b_factors, strict=True)
    found: dict[str, dict[tuple[str, str], _Found]] = {}
    names, entities, models = {}, {}, set()
    for row, place in zip(zip(*columns, strict=True), places, strict=True):
        asym, author, number, residue, atom, label, insertion, model, entity = row
        models.add(model)
        if label == "." or len(models) > 1:
            continue
        names[asym], entities[asym] = author, entity
        number += "" if insertion in "?." else insertion
        found.setdefault(asym, {}).setdefault((number, label), _Found(residue, number, label, {})).see(atom, place)
    whole = _entity_sequences(items)
    chains = []
    for asym, residues in found.items():
        sequence = whole.get(entities[asym])
        numbered = [residue for residue in residues.values() if residue.label.isdigit()]
        if sequence is not None and len(numbered) == len(residues):
            chains.append(_chain(names[asym], sequence, numbered, [int(one.label) - 1 for one in numbered]))
        else:
            chains.append(_chain(names[asym], None, list(residues.values()), None))
    return [chain for chain in chains if chain is not None]


def _entity_sequences(items: dict[str, list[str]]) -> dict[str, list[str]]:
    """The residues' names of each entity, in order; of several at one place (microheterogeneity) the first."""
    numbers: dict[str, dict[int, str]] = {}
    keys = [f"_entity_poly_seq.{name}" for name in ("entity_id", "num", "mon_id")]
    if all(key in items for key in keys):
        for entity, number, name in zip(*(items[key] for key in keys), strict=True):
            numbers.setdefault(entity, {}).setdefault(int(number), name)
    return {
        entity: [places[number] for number in sorted(places)] for entity, places in numbers.items()
        if sorted(places) == list(range(1, len(places) + 1))
    }  # fmt: skip


def _pdb_chains(path: Path) -> list[Chain]:
    whole: dict[str, list[str]] = {}
    found: dict[str, dict[str, _Found]] = {}
    ended: set[str] = set()
    letters = _letters()
    for line in path.read_text(encoding="latin-1").splitlines():
        # a chain without a name is "." in mmCIF
        kind, chain = line[:6], line[21:22].strip() or "."
        if kind == "SEQRES":
            whole.setdefault(line[11:12].strip() or ".", []).extend(line[19:].split())
        elif kind == "TER   " or line.strip() == "TER":
            # what follows under the chain's name are ligands and water
            ended.add(chain)
        elif kind == "ENDMDL":
            break
        elif kind in ("ATOM  ", "HETATM") and chain not in ended:
            residue, number = line[17:20].strip(), line[22:27].replace(" ", "")
            if kind == "HETATM" and residue not in letters:
                continue
            values = (line[30:38], line[38:46], line[46:54], line[60:66])
            seen = found.setdefault(chain, {}).setdefault(number, _Found(residue, number, "", {}))
            seen.see(line[12:16].strip(), values)
    chains = [_chain(name, whole.get(name), list(residues.values()), None) for name, residues in found.items()]
    return [chain for chain in chains if chain is not None]


def _chain(name: str, whole: list[str] | None, found: list[_Found], places: list[int] | None) -> Chain | None:
    """The chain of residues at `places` of the whole sequence, which are found where they are not known; None if the
    chain is no protein."""
    if not any("CA" in residue.atoms for residue in found):
        return None
    resolved = _sequence([residue.name for residue in found], name)
    sequence = resolved if whole is None else _sequence(whole, name)
    if places is None:
        places = list(range(len(found))) if whole is None else _places(sequence, resolved, found)
    residues = [
        Residue(place, residue.number, *_atoms(residue))
        for place, residue in zip(places, found, strict=True) if place >= 0
    ]  # fmt: skip
    return Chain(name, sequence, residues, whole is not None)


def _places(sequence: str, resolved: str, found: list[_Found]) -> list[int]:
    """The place of each resolved residue in the whole sequence; -1 where there is none.

    Where the residues' numbers, less some constant, are places of the same residues, these are taken, since an
    alignment cannot say on which side of a gap a residue belongs that stands on both.
    """
    numbers = [int(residue.number) if residue.number.lstrip("-").isdigit() else None for residue in found]
    if None not in numbers:
        steps = np.array(numbers) - numbers[0]
        starts = sorted(range(len(sequence)), key=lambda start: start != (numbers[0] or 0) - 1)
        for start in starts:
            places = (steps + start).tolist()
            inside = min(places) >= 0 and max(places) < len(sequence)
            if inside and all(sequence[place] == letter for place, letter in zip(places, resolved, strict=True)):
                return places
    partner = dict(aligned_pairs(resolved, sequence).tolist())
    return [partner.get(number, -1) for number in range(len(resolved))]


def _atoms(residue: _Found) -> tuple[dict[str, NDArray[np.float64]], float]:
    """The atoms' places, and the B-factor of C-alpha, which a file may lack."""
    b_factor = residue.atoms["CA"][3].strip() if "CA" in residue.atoms else ""
    places = {name: np.array([float(part) for part in atom[:3]]) for name, atom in residue.atoms.items()}
    return places, float("nan" if b_factor in ("", "?", ".") else b_factor)


def _sequence(names: Iterable[str], chain: str) -> str:
    letters = _letters()
    return clean_protein("".join(letters.get(name, "X") for name in names), f"chain {chain}").sequence


def _letters() -> dict[str, str]:
    """One-letter codes of residues, modified ones such as selenomethionine among them."""
    from Bio.Data.PDBData import protein_letters_3to1_extended

    letters: Any = protein_letters_3to1_extended
    return letters
