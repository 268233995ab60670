"""Small structures with what real ones have: loops without atoms, numbers of the authors, water, modified residues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from Bio.Data.PDBData import protein_letters_1to3


@dataclass
class Part:
    """A chain: its whole sequence, the places (from 0) that have atoms, and the authors' number of place 0."""

    id: str
    sequence: str
    resolved: Sequence[int]
    first: int = 1
    modified: Sequence[int] = ()
    # C-beta atoms by place, where they matter
    coordinates: dict[int, Sequence[float]] = field(default_factory=dict)

    def name(self, place: int) -> str:
        """The residue's name; modified methionines are selenomethionine."""
        return "MSE" if place in self.modified else protein_letters_1to3[self.sequence[place]].upper()

    def atoms(self, place: int) -> list[tuple[str, Sequence[float]]]:
        """C-alpha, and C-beta but for glycine."""
        beta = self.coordinates.get(place, (10.0 * place, 0.0, 0.0))
        alpha = (beta[0], beta[1] + 1.5, beta[2])
        return [("CA", beta)] if self.sequence[place] == "G" else [("CA", alpha), ("CB", beta)]


COLUMNS = (
    "group_PDB", "id", "type_symbol", "label_atom_id", "label_alt_id", "label_comp_id", "label_asym_id",
    "label_entity_id", "label_seq_id", "pdbx_PDB_ins_code", "Cartn_x", "Cartn_y", "Cartn_z", "occupancy",
    "B_iso_or_equiv", "auth_seq_id", "auth_comp_id", "auth_asym_id", "auth_atom_id", "pdbx_PDB_model_num",
)  # fmt: skip


def cif_text(parts: Sequence[Part], *, models: int = 1, whole: bool = True, insertions: Sequence[int] = ()) -> str:
    """An mmCIF file. `whole`: with `_entity_poly_seq`; `insertions`: places numbered as the one before, A, B, ..."""
    lines = ["data_test", "#", "_entry.id test", "#"]
    if whole:
        lines += ["loop_", *(f"_entity_poly_seq.{name}" for name in ("entity_id", "num", "mon_id"))]
        for entity, part in enumerate(parts, 1):
            lines += [f"{entity} {place + 1} {part.name(place)}" for place in range(len(part.sequence))]
        lines.append("#")
    lines += ["loop_", *(f"_atom_site.{name}" for name in COLUMNS)]
    serial = 0
    for model in range(1, models + 1):
        for entity, part in enumerate(parts, 1):
            for place in part.resolved:
                group = "HETATM" if place in part.modified else "ATOM"
                back = sum(other <= place for other in insertions)
                number = part.first + place - back
                insertion = chr(65 + insertions.index(place)) if place in insertions else "?"
                for atom, at in part.atoms(place):
                    serial += 1
                    cells = [group, serial, "C", atom, ".", part.name(place), chr(64 + entity), entity, place + 1,
                             insertion, *(f"{x:.3f}" for x in at), "1.00", "50.00", number, part.name(place), part.id,
                             atom, model]  # fmt: skip
                    lines.append(" ".join(f"{cell!s:<6}" for cell in cells))
        for entity, part in enumerate(parts, 1):
            # water under the chain's name, with a number that a residue has
            serial += 1
            cells = ["HETATM", serial, "O", '"O\'"', ".", "HOH", chr(74 + entity), 9, ".", "?", 0, 0, 0, "1.00",
                     "40.00", part.first, "HOH", part.id, "O", model]  # fmt: skip
            lines.append(" ".join(f"{cell!s:<6}" for cell in cells))
    return "\n".join([*lines, "#", "_later.item 'stays as it is'", "#"]) + "\n"


def pdb_text(parts: Sequence[Part], *, seqres: bool = True) -> str:
    """A PDB file."""
    lines = []
    for part in parts if seqres else ():
        names = [part.name(place) for place in range(len(part.sequence))]
        for row, start in enumerate(range(0, len(names), 13), 1):
            lines.append(f"SEQRES {row:3d} {part.id} {len(names):4d}  {' '.join(names[start : start + 13])}")
    serial = 0
    for part in parts:
        for place in part.resolved:
            group = "HETATM" if place in part.modified else "ATOM"
            for atom, (x, y, z) in part.atoms(place):
                serial += 1
                lines.append(f"{group:<6}{serial:5d}  {atom:<3} {part.name(place):>3} {part.id}"
                             f"{part.first + place:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 50.00")  # fmt: skip
        lines.append(f"TER   {serial + 1:5d}      {part.name(part.resolved[-1]):>3} {part.id}")
    return "\n".join([*lines, "END"]) + "\n"
