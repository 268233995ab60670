"""Numbers of residues onto a structure: `longlens.paint` and `longlens paint`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longlens.errors import InputError
from longlens.io.alignment import aligned_pairs, identity
from longlens.io.alphabet import clean_protein
from longlens.io.chains import CIF, Chain, read_chains
from longlens.io.painting import defattr_text, painted_cif, require_attribute
from longlens.io.results import write_whole, writing
from longlens.jobs.residue_values import ResidueValues, digest, read_residue_values
from longlens.jobs.single_file import refuse_folder

# chains this alike are taken for the protein where none is named; a named one needs the least
ALIKE, LEAST = 0.9, 0.3


@dataclass(frozen=True)
class Mismatch:
    """The protein's residue at `position` (from 1) is another one in the chain's sequence at `label` (from 1)."""

    position: int
    residue: str
    label: int
    found: str

    def __str__(self) -> str:
        return f"residue {self.position} is {self.residue} in the protein and {self.found} in the structure"


@dataclass(frozen=True)
class PaintedChain:
    """What became of a chain: `painted` residues have a value, `bare` ones are in the structure and have none,
    `unresolved` ones have a value and no atoms."""

    id: str
    identity: float
    painted: int
    bare: int
    unresolved: int
    mismatches: list[Mismatch]


@dataclass(frozen=True)
class Painting:
    """A file with numbers of residues, and the chains that got them."""

    path: Path
    chains: list[PaintedChain]


def paint(
    structure: str | Path,
    values: ArrayLike | str | Path | Any,
    output: str | Path,
    *,
    sequence: str | None = None,
    column: str = "surprise",
    protein: str | None = None,
    chain: str | Sequence[str] | None = None,
    fasta: str | Path | None = None,
    attribute: str | None = None,
    missing: float | None = None,
) -> Painting:
    """Write one number for each residue onto a structure, as a new file.

    longlens.paint("1abc.cif", "results/", "surprise.cif")
    longlens.paint("1abc.cif", numbers, "numbers.defattr", sequence="MKTAYIAK")

    The protein's residues are aligned with the whole sequence of each chain (`label_seq_id`, SEQRES), so that residues
    without atoms shift nothing.

    Args:
        structure: a .pdb, .cif or .mmcif file, which is not changed.
        values: results of `longlens.embed`, `longlens.look` or `longlens.context`, or their folder; a table with a
            column of residues; or numbers (L,), with `sequence`.
        output: .cif: the structure with the numbers in `B_iso_or_equiv`; .defattr: an attribute for ChimeraX.
        sequence: the protein's L residues, for numbers.
        column: the array or column of the results.
        protein: its id, where the results have several.
        chain: chains to paint; None: all that are at least 90 % identical to the protein.
        fasta: the proteins, for results of `embed` that are not identical to a chain.
        attribute: name of ChimeraX's attribute; None: the column.
        missing: the number of atoms without one, such as water, in a .cif file; None: 0.

    Raises:
        InputError: files that cannot be read, no chain of the protein, another protein.
    """
    source, target = Path(structure), Path(output)
    _check_output(source, target)
    name = attribute or column
    if target.suffix == ".defattr":
        require_attribute(name)
    _refuse_useless(target, attribute, missing)
    chains = read_chains(source)
    numbers = _values(values, sequence, column, protein, None if fasta is None else Path(fasta), chains)
    named = [chain] if isinstance(chain, str) else chain
    painted: dict[tuple[str, str], float] = {}
    report = []
    for one, pairs, alike in _matching(chains, numbers, named, source):
        value_of = {int(j): float(numbers.values[i]) for i, j in pairs if np.isfinite(numbers.values[i])}
        there = {residue.place: residue.number for residue in one.residues}
        painted |= {(one.id, there[place]): value for place, value in value_of.items() if place in there}
        done = len(value_of.keys() & there.keys())
        report.append(PaintedChain(one.id, alike, done, len(there) - done, len(value_of.keys() - there.keys()),
                                   _mismatches(numbers, one, pairs)))  # fmt: skip
    text = defattr_text(painted, name) if target.suffix == ".defattr" else painted_cif(source, painted, missing or 0.0)
    with writing(target):
        write_whole(target, text.encode())
    return Painting(target, report)


def _check_output(source: Path, target: Path) -> None:
    if target.suffix.lower() not in (*CIF, ".defattr"):
        raise InputError(
            f"expected an output that ends in .cif or .defattr, got {target}; a .pdb file has room for two decimals"
        )
    refuse_folder(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"expected another file than the structure, {source}, which is not changed; name a new one")


def _refuse_useless(target: Path, attribute: str | None, missing: float | None) -> None:
    """Raise `InputError` for what does not belong to the format of the output, and for a number that is none."""
    if target.suffix == ".defattr" and missing is not None:
        raise InputError(
            "expected --missing (missing) only with an output in .cif: in .defattr such atoms have no line"
        )
    if target.suffix != ".defattr" and attribute is not None:
        raise InputError(
            f"expected --attribute (attribute) only with an output in .defattr, got {target}, where numbers are "
            "B-factors"
        )
    if missing is not None and not np.isfinite(missing):
        raise InputError(f"expected a finite number for atoms that have none, got {missing}")


def _values(
    values: Any, sequence: str | None, column: str, protein: str | None, fasta: Path | None, chains: Sequence[Chain]
) -> ResidueValues:
    path = getattr(values, "folder", values)
    if isinstance(path, str | Path):
        if sequence is not None:
            raise InputError("expected a sequence only with numbers, got one with results; give fasta instead")
        return read_residue_values(
            Path(path), column, protein=protein, fasta=fasta, alike=[chain.sequence for chain in chains]
        )
    numbers = np.asarray(values, np.float64)
    if sequence is None:
        raise InputError("expected the sequence of the protein with its numbers, got none")
    cleaned = clean_protein(sequence).sequence
    if numbers.shape != (len(cleaned),):
        raise InputError(f"expected one number for each of {len(cleaned)} residues, got numbers {numbers.shape}")
    return ResidueValues(protein or "", numbers, cleaned, digest(cleaned))


def _matching(
    chains: Sequence[Chain], numbers: ResidueValues, named: Sequence[str] | None, source: Path
) -> list[tuple[Chain, NDArray[np.int64], float]]:
    """The chains to paint, each with the residues that correspond, (M, 2) in the protein and the chain."""
    if named is not None:
        unknown = sorted(set(named) - {chain.id for chain in chains})
        if unknown:
            held = ", ".join(chain.id for chain in chains)
            raise InputError(f"{source}: expected protein chains of {held}, got {', '.join(unknown)}")
        chains = [chain for chain in chains if chain.id in named]
    found = []
    for chain in chains:
        if numbers.sequence is None:
            if not numbers.matches(chain.sequence):
                continue
            pairs = np.stack([np.arange(len(chain.sequence))] * 2, 1)
            found.append((chain, pairs, 1.0))
        else:
            pairs = aligned_pairs(numbers.sequence, chain.sequence)
            found.append((chain, pairs, identity(pairs, numbers.sequence, chain.sequence)))
    if numbers.sequence is None and not found:
        raise InputError(
            f"{source}: no chain has exactly the residues of the protein {numbers.id!r}, and its results do not hold "
            "its sequence, with which the chains could be aligned; give its FASTA file with --fasta"
        )
    kept = [item for item in found if item[2] >= (ALIKE if named is None else LEAST)]
    if not kept:
        listed = ", ".join(f"{chain.id} {alike:.0%}" for chain, _, alike in found)
        advice = "; name a chain to paint it all the same" if named is None else ""
        raise InputError(
            f"{source}: expected a chain of the protein {numbers.id!r}, got identities of {listed}{advice}"
        )
    return kept


def _mismatches(numbers: ResidueValues, chain: Chain, pairs: NDArray[np.int64]) -> list[Mismatch]:
    if numbers.sequence is None:
        return []
    return [
        Mismatch(i + 1, numbers.sequence[i], j + 1, chain.sequence[j])
        for i, j in pairs.tolist() if numbers.sequence[i] != chain.sequence[j]
    ]  # fmt: skip
