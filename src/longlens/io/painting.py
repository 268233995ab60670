"""Numbers of residues in files for viewers: ChimeraX's attributes, and the B-factor column of an mmCIF file."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlens.errors import InputError
from longlens.io.chains import CIF

# chain and number of residues, as viewers name them, and the number to show
Painted = Mapping[tuple[str, str], float]

# the words of a line of mmCIF: quoted, where the closing quote is followed by a blank, or bare
_WORD = re.compile(r"'.*?'(?=\s|$)|\".*?\"(?=\s|$)|\S+")
# ChimeraX keeps names that begin with a capital for itself
_ATTRIBUTE = re.compile(r"[a-z][A-Za-z0-9_]*")
_CAN_HOLD = ("_atom_site.auth_asym_id", "_atom_site.auth_seq_id", "_atom_site.B_iso_or_equiv")


def require_attribute(name: str) -> None:
    """Raise `InputError` if ChimeraX would not take the name of an attribute."""
    if not _ATTRIBUTE.fullmatch(name):
        raise InputError(
            f"expected the name of an attribute, a small letter and then letters, digits and _, got {name!r}"
        )


def defattr_text(values: Painted, attribute: str) -> str:
    """A file that ChimeraX's `open` assigns to the residues of the structure that is open (its `.defattr` format)."""
    require_attribute(attribute)
    lines = [f"attribute: {attribute}", "match mode: any", "recipient: residues"]
    lines += [f"\t/{chain}:{number}\t{value:.6g}".replace("/.:", ":") for (chain, number), value in values.items()]
    return "\n".join(lines) + "\n"


def painted_cif(structure: Path, values: Painted, missing: float) -> str:
    """The structure as mmCIF with the values in `B_iso_or_equiv`; `missing` is that of all other atoms.

    Of an mmCIF file nothing else changes, not even blanks. A PDB file is converted (Biopython's `MMCIFIO`), because its
    field has room for two decimals.

    Raises:
        InputError: atoms whose rows are broken into several lines, or have no such column.
    """
    given = structure.suffix.lower() in CIF
    text = structure.read_text(encoding="utf-8") if given else _as_cif(structure)
    lines = text.splitlines(keepends=True)
    columns: list[str] = []
    for number, line in enumerate(lines):
        word = line.strip()
        if word.startswith("_atom_site."):
            columns.append(word.split()[0])
        elif columns and word and not word.startswith("#"):
            if word.startswith(("loop_", "_", "data_")):
                break
            _require(columns, structure)
            lines[number] = _with_value(line, columns, values, missing, f"{structure}, line {number + 1}", given)
        elif columns and word.startswith("#"):
            break
    return "".join(lines)


def _with_value(line: str, columns: list[str], values: Painted, missing: float, where: str, labelled: bool) -> str:
    """The line of an atom with its value. `labelled`: whether only residues of polymers have a `label_seq_id`."""
    words = list(_WORD.finditer(line))
    if len(words) != len(columns):
        raise InputError(f"{where}: expected the {len(columns)} items of an atom in one line, got {len(words)}")
    cells = {name: word[0] for name, word in zip(columns, words, strict=True)}
    insertion = cells.get("_atom_site.pdbx_PDB_ins_code", "?")
    number = cells["_atom_site.auth_seq_id"] + ("" if insertion in "?." else insertion)
    chain = cells["_atom_site.auth_asym_id"].strip("'\"")
    # ligands and water may have the numbers of residues
    polymer = not labelled or cells.get("_atom_site.label_seq_id", "1") != "."
    value = values.get((chain, number), missing) if polymer else missing
    place = words[columns.index("_atom_site.B_iso_or_equiv")]
    # four decimals, as tables of atoms have them, but for numbers that would be longer than a line
    text = f"{value:.4f}" if abs(value) < 1e9 else f"{value:.6e}"
    return f"{line[: place.start()]}{text.ljust(len(place[0]))}{line[place.end() :]}"


def _require(columns: list[str], structure: Path) -> None:
    lacking = [name for name in _CAN_HOLD if name not in columns]
    if lacking:
        raise InputError(f"{structure}: expected atoms with {', '.join(lacking)}, which the file lacks")


def _as_cif(structure: Path) -> str:
    from Bio.PDB.mmcifio import MMCIFIO
    from Bio.PDB.PDBParser import PDBParser

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        parser: Any = PDBParser(QUIET=True)
        writer: Any = MMCIFIO()
        writer.set_structure(parser.get_structure(structure.stem, structure))
        target = Path(folder) / "converted.cif"
        writer.save(str(target), preserve_atom_numbering=True)
        return target.read_text(encoding="utf-8")
