"""Predicted contacts beside structures: `longlens.evaluate_contacts` and `longlens contacts evaluate`."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.alignment import aligned_pairs, identity
from longlens.io.alphabet import clean_protein
from longlens.io.chains import Chain, read_chains
from longlens.io.contact_rr import SUFFIX, read_rr
from longlens.io.fasta import read_fasta
from longlens.io.results import MANIFEST, read_manifest, write_whole, writing
from longlens.jobs.contact_maps import ContactMaps
from longlens.jobs.contact_ranges import CUTS, RANGES, precision_by_range
from longlens.jobs.output import OutputFolder
from longlens.jobs.residue_values import digest
from longlens.jobs.single_file import refuse_folder
from longlens.report.arrow import ArrowTable, arrow_table
from longlens.report.tables import html_table, to_frame

# a chain that a name leads to has to be this alike
LEAST = 0.3
LENGTHS = ("full", "resolved")


@dataclass(frozen=True)
class Prediction:
    """Predicted contacts of a protein. `length` is 0, and `sha256` and `sequence` are "", where they are unknown."""

    id: str
    length: int
    sha256: str
    sequence: str
    parts: Callable[[], Iterable[dict[str, NDArray[Any]]]]


@dataclass(frozen=True)
class _Place:
    structure: Path
    chain: Chain

    @property
    def names(self) -> set[str]:
        return self.chain.names(self.structure)


class ContactEvaluation(ArrowTable):
    """Precision by protein, range and cut (`rows`), the means over proteins (`summary`), the predictions that no
    structure was found for (`unmatched`), and those whose structure has no contacts (`without_contacts`)."""

    def __init__(
        self, rows: list[dict[str, Any]], unmatched: list[str], without_contacts: list[str], length: str
    ) -> None:
        self.rows, self.unmatched, self.without_contacts, self.length = rows, unmatched, without_contacts, length

    @property
    def summary(self) -> list[dict[str, Any]]:
        """For each range and cut: the mean precision over proteins with contacts in it, chance, and their number."""
        means = []
        for name in RANGES:
            for cut in CUTS:
                rows = [row for row in self.rows if (row["range"], row["cut"]) == (name, cut)]
                if rows:
                    mean = {key: float(np.mean([row[key] for row in rows])) for key in ("precision", "chance")}
                    means.append({"range": name, "cut": cut, **mean, "proteins": len(rows)})
        return means

    def columns(self) -> dict[str, Any]:
        """`rows` as columns."""
        return {name: [row[name] for row in self.rows] for name in self.rows[0]}

    def to_frame(self) -> Any:
        """`rows` as a pandas data frame. Needs the extra `notebook`."""
        return to_frame(self.columns())

    def save(self, path: str | Path) -> Path:
        """Write `rows` as CSV."""
        target, text = Path(path), io.StringIO()
        refuse_folder(target)
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{cell:.6f}" if isinstance(cell, float) else cell for name, cell in row.items()}
            for row in self.rows
        )
        with writing(target):
            write_whole(target, text.getvalue().encode())
        return target

    def _arrow(self) -> Any:
        return arrow_table(self.columns())

    def _repr_html_(self) -> str:
        summary = self.summary
        columns = {name: [row[name] for row in summary] for name in summary[0]}
        return html_table(columns, title=f"precision of contacts, L: {self.length} length", total=len(summary))


def evaluate_contacts(
    predictions: Any,
    structures: str | Path | Sequence[str | Path],
    *,
    fasta: str | Path | None = None,
    length: str = "full",
) -> ContactEvaluation:
    """The precision of predicted contacts at L, L/2 and L/5, by range (`longlens.jobs.contact_ranges`).

    Args:
        predictions: results of `longlens.contacts` or their folder, files of CASP's format RR (.rr), or several.
        structures: .pdb, .cif or .mmcif files. A prediction belongs to the chain with the same residues, or whose name
            is the protein's id (1abc_A, or 1abc if it has one chain); one prediction and one chain belong together.
        fasta: the proteins, where a chain's sequence is not that of the prediction: the two are aligned.
        length: what L is: "full", the residues of the chain's sequence, or "resolved", those with atoms.

    Raises:
        InputError: files that cannot be read, no structure for any prediction, or none with contacts, residues beyond
            the chain.
    """
    if length not in LENGTHS:
        raise InputError(f"expected length of {', '.join(LENGTHS)}, got {length!r}")
    listed = predictions if isinstance(predictions, list | tuple) else [predictions]
    files = [structures] if isinstance(structures, str | Path) else structures
    sequences = {} if fasta is None else {
        record.id: clean_protein(record.sequence, record.place).sequence for record in read_fasta(Path(fasta))
    }  # fmt: skip
    held = [prediction for given in listed for prediction in _read(given, sequences)]
    places = [_Place(Path(path), chain) for path in files for chain in read_chains(Path(path))]
    if not held or not places:
        raise InputError(f"expected predictions and structures, got {len(held)} and {len(places)} chains")
    rows, unmatched, bare = [], [], []
    for prediction in held:
        place = _match(prediction, places, alone=len(held) == len(places) == 1)
        if place is None:
            unmatched.append(prediction.id)
            continue
        chain = place.chain
        resolved = len(chain.resolved)
        counted = len(chain.sequence) if length == "full" else resolved
        parts = list(precision_by_range(prediction.parts(), _partners(prediction, place), chain, counted))
        if not parts:
            bare.append(prediction.id)
        for part in parts:
            rows.append({"id": prediction.id, "structure": place.structure.name, "chain": chain.id,
                         "length": len(chain.sequence), "resolved": resolved, **asdict(part)})  # fmt: skip
    if bare and not rows:
        raise InputError(
            f"expected contacts in the structures of {', '.join(bare[:5])}, found none: no two of their residues, 6 or "
            "more apart, have C-beta atoms less than 8 Angstrom apart; give structures of whole proteins"
        )
    if not rows:
        names = ", ".join(sorted({f"{place.structure.name} {place.chain.id}" for place in places})[:5])
        raise InputError(
            f"expected a structure of {', '.join(unmatched[:5])}, got {names}; a chain has "
            "the same residues or its name as the protein's id (1abc_A); give the proteins with --fasta to align them"
        )
    return ContactEvaluation(rows, unmatched, bare, length)


def _read(given: Any, sequences: dict[str, str]) -> Iterator[Prediction]:
    if not isinstance(given, ContactMaps):
        path = Path(given)
        if path.suffix == SUFFIX:
            held = read_rr(path)
            part = {"i": held.i, "j": held.j, "probability": held.probability}
            name = held.target or path.stem
            sequence = sequences.get(name, held.sequence)
            yield Prediction(name, len(sequence), digest(sequence) if sequence else "", sequence, lambda: [part])
            return
        if path.is_dir() and not (path / MANIFEST).is_file():
            files = sorted(path.glob(f"*{SUFFIX}"))
            if not files:
                raise InputError(f"{path}: expected results of longlens contacts, or files {SUFFIX}, found none")
            for file in files:
                yield from _read(file, sequences)
            return
        given = _opened(path)
    for number, row in enumerate(given.table):
        if row["problem"] is None:
            parts = partial(given._parts, number)
            yield Prediction(row["id"], row["length"], row["sha256"], sequences.get(row["id"], ""), parts)


def _opened(path: Path) -> ContactMaps:
    if not path.is_dir():
        raise InputError(f"{path}: expected a folder of longlens contacts or a file {SUFFIX}, found another or none")
    if not read_manifest(path)["complete"]:
        raise InputError(f"{path}: expected a finished job, got one that is not; run its command again")
    maps = ContactMaps(OutputFolder(path))
    if not (path / "index.parquet").is_file() or "pairs" not in maps.table[0]:
        raise InputError(f"{path}: expected results of longlens contacts, found those of another command")
    return maps


def _match(prediction: Prediction, places: Sequence[_Place], *, alone: bool) -> _Place | None:
    same = [place for place in places if prediction.sha256 and digest(place.chain.sequence) == prediction.sha256]
    named = [place for place in places if prediction.id in place.names]
    files = [place for place in places if prediction.id == place.structure.name.split(".")[0]]
    # of the equal chains of a homomer the first, unless the id names one
    if both := [place for place in same if place in named]:
        return both[0]
    if same or named:
        return (same or named)[0]
    if len(files) == 1 or alone:
        return (files or list(places))[0]
    return None


def _partners(prediction: Prediction, place: _Place) -> NDArray[np.int64]:
    """The place in the chain's sequence of each residue of a prediction, -1 where there is none."""
    chain = place.chain
    where = f"{place.structure}, chain {chain.id}"
    sequence = prediction.sequence or chain.sequence
    if not prediction.sequence and prediction.sha256 not in ("", digest(sequence)):
        raise InputError(
            f"{where}: its residues ({len(sequence):,}) are not those of {prediction.id} ({prediction.length:,}); give "
            "the protein with --fasta, so that the two are aligned"
        )
    last = max((int(part["j"].max(initial=0)) for part in prediction.parts()), default=0)
    if last > len(sequence):
        raise InputError(
            f"{where}: expected residues in 1..{len(sequence)}, got {last} in the pairs of {prediction.id}"
        )
    if sequence == chain.sequence:
        return np.arange(len(sequence))
    pairs = aligned_pairs(sequence, chain.sequence)
    alike = identity(pairs, sequence, chain.sequence)
    if alike < LEAST:
        raise InputError(f"{where}: expected the protein {prediction.id}, got an identity of {alike:.0%}")
    partners = np.full(len(sequence), -1, np.int64)
    partners[pairs[:, 0]] = pairs[:, 1]
    return partners
