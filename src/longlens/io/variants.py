"""The notations of protein variants: A24G, A24G:T56S, HGVS (p.Lys24Ala, den Dunnen et al. 2016), WT.

A variant is a set of substitutions; the wild type has none. Anything else than substitutions by the 20 standard
residues (a stop, an insertion or deletion, X, B, an empty cell) raises a `VariantError`, whose `reason` is a few words
for a column of a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longlens.errors import InputError, VariantError
from longlens.io.alphabet import STANDARD

# https://iupac.qmul.ac.uk/AminoAcid/A2021.html, with the codes that do not denote a single standard residue
THREE_LETTERS = {
    "ALA": "A", "CYS": "C", "ASP": "D", "GLU": "E", "PHE": "F", "GLY": "G", "HIS": "H", "ILE": "I", "LYS": "K",
    "LEU": "L", "MET": "M", "ASN": "N", "PRO": "P", "GLN": "Q", "ARG": "R", "SER": "S", "THR": "T", "VAL": "V",
    "TRP": "W", "TYR": "Y", "SEC": "U", "PYL": "O", "ASX": "B", "GLX": "Z", "XLE": "J", "XAA": "X", "TER": "*",
    "STP": "*",
}  # fmt: skip
# `_wt` and `_sy` (synonymous) are Enrich2's and MaveDB's
WILD_TYPES = frozenset({"wt", "=", "p.=", "p.(=)", "wildtype", "wild type", "wild-type", "wild_type", "_wt", "_sy"})
MISSING = frozenset({"", "na", "n/a", "nan", "none", "null", "-"})
_CHANGES = {
    "delins": "insertion and deletion", "fs": "frameshift", "ext": "extension", "del": "deletion", "ins": "insertion",
    "dup": "duplication", "inv": "inversion",
}  # fmt: skip

_SUBSTITUTION = re.compile(r"(?P<wild>[A-Z]{3}|[A-Z*])(?P<number>-?\d+)(?P<mutant>[A-Z]{3}|[A-Z*=\-])")
_CHANGE = re.compile(rf"\d.*?(?P<after>{'|'.join(_CHANGES)})|^(?P<before>del|ins|dup)[a-z]*\d|^(?P<delta>[Δ∆])", re.I)
_REFERENCE = re.compile(r"[\w.\-]+(\(\w+\))?:\s*(?=[pcgmnr]\.)")
_NUCLEOTIDES = re.compile(r"[cgmnr]\.", re.I)


@dataclass(frozen=True)
class Mutation:
    """The residue `wild` at `position` (from 0) becomes `mutant`."""

    wild: str
    position: int
    mutant: str


def parse_variant(text: str | None, sequence: str, offset: int = 1) -> tuple[Mutation, ...]:
    """The substitutions of a variant, in the order in which they are written; none for the wild type.

    Args:
        text: one variant: substitutions in one-letter or three-letter code, separated by ":", "," or ";", with or
            without HGVS's "p.", parentheses, brackets and a reference before it ("NP_000537.3:p.[Lys2Ala;Thr3Ser]");
            "WT" or "=" for the wild type; upper or lower case. "K2=" and "K2K" are substitutions that change nothing.
        sequence: the protein, cleaned (`longlens.io.alphabet.clean_protein`).
        offset: the number of the protein's first residue.

    Raises:
        VariantError: another notation, a position outside the protein, a wild-type residue that differs from the
            protein's, or a position that occurs twice.
    """
    stripped = (text or "").strip()
    if stripped.lower() in MISSING:
        raise VariantError(f"expected a variant such as A24G, A24G:T56S or WT, got {stripped!r}", "empty")
    if stripped.lower() in WILD_TYPES:
        return ()
    if reference := _REFERENCE.match(stripped):
        # a substitution before the colon is a part of the variant, an accession is not
        if not _SUBSTITUTION.fullmatch(reference[0].rstrip(": ").upper().removeprefix("P.").strip("()")):
            stripped = stripped[reference.end() :]
        if stripped.lower() in WILD_TYPES:
            return ()
    if _NUCLEOTIDES.match(stripped):
        raise VariantError(
            f"expected a variant of the protein such as p.Lys24Ala, got {text!r}, which is a variant of its gene; "
            "translate it first",
            "nucleotide notation",
        )
    bare = re.sub(r"^p\.", "", stripped, flags=re.I)
    if bare.startswith("[") and bare.endswith("]"):
        bare = bare[1:-1]
    mutations = tuple(_parse_substitution(part, sequence, offset) for part in re.split(r"[:;,]", bare))
    positions = [mutation.position for mutation in mutations]
    for position in positions:
        if positions.count(position) > 1:
            raise VariantError(f"expected each position once, got {text!r}", f"position {position + offset} twice")
    return mutations


def mutate(sequence: str, variant: Sequence[Mutation]) -> str:
    """The sequence with the mutations applied."""
    residues = list(sequence)
    for mutation in variant:
        residues[mutation.position] = mutation.mutant
    return "".join(residues)


def read_variants(
    rows: Iterable[str | None], sequence: str, offset: int = 1, on_error: str = "stop"
) -> list[tuple[tuple[Mutation, ...] | None, str]]:
    """(substitutions, "") of each row by `parse_variant`, or, with `on_error` "skip", (None, reason) of invalid rows.

    With "stop" the first invalid row raises a `VariantError` that gives the row's number (from 1).
    """
    if on_error not in ("stop", "skip"):
        raise InputError(f"expected on_error stop or skip, got {on_error!r}")
    variants: list[tuple[tuple[Mutation, ...] | None, str]] = []
    for number, text in enumerate(rows, 1):
        try:
            variants.append((parse_variant(text, sequence, offset), ""))
        except VariantError as error:
            if on_error == "stop":
                raise VariantError(f"row {number}: {error}", error.reason) from None
            variants.append((None, error.reason))
    return variants


def _parse_substitution(part: str, sequence: str, offset: int) -> Mutation:
    """One substitution, compared with the protein."""
    text = re.sub(r"^p\.", "", part.strip(), flags=re.I).strip("()")
    if change := _CHANGE.search(text):
        kind = "deletion" if change["delta"] else _CHANGES[(change["after"] or change["before"]).lower()]
        raise VariantError(f"{part}: expected substitutions such as A24G, got another change ({kind})", kind)
    match = _SUBSTITUTION.fullmatch(text.upper())
    if match is None:
        raise VariantError(
            f"expected substitutions such as A24G, A24G:T56S or p.Lys24Ala, got {part.strip()!r}", "not a substitution"
        )
    wild = _one_letter(match["wild"], part)
    mutant = wild if match["mutant"] == "=" else _one_letter(match["mutant"], part)
    number, position = int(match["number"]), int(match["number"]) - offset
    if mutant in "*-":
        kind = "stop" if mutant == "*" else "deletion"
        raise VariantError(f"{part}: expected substitutions such as A24G, got another change ({kind})", kind)
    if not 0 <= position < len(sequence):
        last = offset + len(sequence) - 1
        raise VariantError(
            f"{part}: expected a position in {offset}..{last}, got {number}; the number of the first residue is given "
            "with --offset-idx",
            f"position {number} outside {offset}..{last}",
        )
    if sequence[position] != wild:
        near = sequence[max(0, position - 3) : position + 4]
        raise VariantError(
            f"{part}: expected the protein to have {wild} at {number}, got {sequence[position]} (in {near}); check "
            "the protein and --offset-idx",
            f"wild type at {number} is {sequence[position]}, not {wild}",
        )
    for residue in (wild, mutant):
        if residue not in STANDARD:
            older = "; a stop is written *" if residue == "X" else ""
            raise VariantError(
                f"{part}: expected one of the 20 standard residues ({STANDARD}), got {residue}{older}",
                f"residue {residue}",
            )
    return Mutation(wild, position, mutant)


def _one_letter(code: str, part: str) -> str:
    """The one-letter code of a residue, given by its one-letter or three-letter code."""
    if len(code) == 1:
        return code
    if code not in THREE_LETTERS:
        raise VariantError(f"{part}: expected the three-letter code of a residue, got {code}", f"residue {code}")
    return THREE_LETTERS[code]
