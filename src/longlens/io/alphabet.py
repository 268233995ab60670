"""Residues and tokens: cleaning a protein sequence, recognising DNA and prose, and numbering the residues.

Every sequence that enters a model, from the command line or from Python, goes through `clean_protein`.
"""

from __future__ import annotations

import math
import string
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError, SequenceError

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
# selenocysteine, pyrrolysine, and the ambiguous codes: D or N, E or Q, any residue
RARE = "UOBZX"
GAPS = "-."
# between the chains of a complex, in models that take it (ESM-C), and as fair-esm's users write it
CHAIN_BREAK = "|"
_OTHER_BREAK = ":"

_KEPT = frozenset(STANDARD + RARE)
_DROP_BLANKS = str.maketrans("", "", string.whitespace)

Kind = Literal["protein", "dna", "text", "aligned"]

# how many records of a file are examined to recognise an alignment
_LOOKED_AT = 100
# shorter sequences are not classified, since a short peptide may spell anything
_LEAST = 20
# per cent of each letter in English prose (Norvig 2012) and in UniProtKB/Swiss-Prot (release statistics); letters that
# proteins hardly have count as 1 per cent, so that a few unusual residues do not make a text
_ENGLISH = dict(zip(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    (8.04, 1.48, 3.34, 3.82, 12.49, 2.40, 1.87, 5.05, 7.57, 0.16, 0.54, 4.07, 2.51, 7.23, 7.64, 2.14, 0.12, 6.28, 6.51,
     9.28, 2.73, 1.05, 1.68, 0.23, 1.66, 0.09), strict=True,
))  # fmt: skip
_SWISS_PROT = dict.fromkeys("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 1.0) | dict(zip(
    STANDARD,
    (8.26, 1.38, 5.46, 6.72, 3.86, 7.07, 2.27, 5.91, 5.80, 9.65, 2.41, 4.06, 4.74, 3.93, 5.53, 6.64, 5.35, 6.86, 1.10,
     2.92), strict=True,
))  # fmt: skip


@dataclass(frozen=True)
class CleanedProtein:
    """A cleaned sequence and what cleaning did to it.

    `substituted` residues became X (J and inner stops), `gaps` were dropped; a trailing stop is dropped uncounted.
    """

    sequence: str
    substituted: int = 0
    gaps: int = 0

    def __len__(self) -> int:
        return len(self.sequence)


def clean_protein(raw: str, record: str = "the sequence", *, chains: bool = False) -> CleanedProtein:
    """The sequence in upper case, without blanks, gaps and trailing stops, and with J and inner stops replaced by X.

    `chains`: it may be a complex, with `CHAIN_BREAK` or `:` (fair-esm) between its chains. These are cleaned one by one
    and have `CHAIN_BREAK` between them.

    Raises `SequenceError` for an empty sequence or chain and for any other character; the message names `record`, the
    chain of several, the position (from 1, blanks not counted) and the character.
    """
    if chains and may_be_complex(raw):
        texts = raw.replace(_OTHER_BREAK, CHAIN_BREAK).split(CHAIN_BREAK)
        parts = [clean_protein(text, f"{record}, chain {number}") for number, text in enumerate(texts, 1)]
        return CleanedProtein(
            CHAIN_BREAK.join(part.sequence for part in parts), sum(part.substituted for part in parts),
            sum(part.gaps for part in parts),
        )  # fmt: skip
    letters = raw.translate(_DROP_BLANKS)
    sequence = letters.upper() if letters.isascii() else letters
    unknown = set(sequence) - _KEPT
    substituted = gaps = 0
    if unknown:
        gaps = sum(map(sequence.count, GAPS))
        # gaps may follow the stop
        sequence = sequence.translate(str.maketrans("", "", GAPS)).rstrip("*")
        substituted = sequence.count("J") + sequence.count("*")
        sequence = sequence.translate(str.maketrans("J*", "XX"))
        for character in unknown - set("J*" + GAPS):
            if character in sequence:
                _refuse(letters, record)
    if not sequence:
        raise SequenceError(f"{record}: expected at least one residue, got none; remove the record or skip it")
    return CleanedProtein(sequence, substituted, gaps)


def may_be_complex(raw: str) -> bool:
    """Whether a raw sequence has a sign that stands between chains."""
    return CHAIN_BREAK in raw or _OTHER_BREAK in raw


def chain_breaks(sequence: str) -> NDArray[np.bool_]:
    """(L,): which places of a cleaned sequence are `CHAIN_BREAK`."""
    return np.frombuffer(sequence.encode(), dtype=np.uint8) == ord(CHAIN_BREAK)


def _refuse(letters: str, record: str) -> None:
    accepted = _KEPT | set("J*" + GAPS)
    place, character = next(
        (place, c) for place, c in enumerate(letters, 1) if not c.isascii() or c.upper() not in accepted
    )
    hint = ""
    if may_be_complex(character):
        hint = (
            "; split a complex into its chains, one record each; `embed`, `plan`, `score` and `look` take it "
            "whole with a model of complexes (ESM-C)"
        )
    raise SequenceError(
        f"{record}: expected amino acids ({STANDARD}{RARE}, J, *), got {character!r} at position {place}{hint}"
    )


def clean_proteins(sequences: str | Iterable[str], *, chains: bool = False) -> list[str]:
    """The cleaned sequences of one protein (a string) or of several, as `clean_protein` cleans them.

    Warns if residues were replaced by X or gaps were left out, since positions then differ from those of the input.

    Raises:
        SequenceError: there is no protein, an item is not a string, or `clean_protein` refuses it; the message gives
            the number of the sequence (from 1), the position and the character.
    """
    cleaned = []
    for number, raw in enumerate([sequences] if isinstance(sequences, str) else sequences, 1):
        if not isinstance(raw, str):
            raise SequenceError(f"sequence {number}: expected a string of residues, got {type(raw).__name__}")
        protein = clean_protein(raw, f"sequence {number}", chains=chains)
        if protein.gaps:
            warnings.warn(
                f"sequence {number}: {protein.gaps} gaps were left out; positions count without them", stacklevel=3
            )
        if protein.substituted:
            warnings.warn(f"sequence {number}: {protein.substituted} residues (J, inner *) became X", stacklevel=3)
        cleaned.append(protein.sequence)
    if not cleaned:
        raise SequenceError("expected at least one protein, got none")
    return cleaned


def kind_of(sequence: str) -> Kind:
    """What a raw sequence (not cleaned) looks like: "text", "dna", "aligned", or otherwise "protein".

    A guess from its letters, for warnings and errors; sequences of fewer than 20 letters are "protein" or "aligned".
    """
    if looks_like_text(sequence):
        return "text"
    if looks_like_dna(sequence):
        return "dna"
    return "aligned" if any(gap in sequence.strip().strip(GAPS) for gap in GAPS) else "protein"


def looks_like_dna(sequence: str) -> bool:
    """Whether at least 20 letters, 95 per cent of them A, C, G, T, U or N, make this DNA or RNA.

    At least three of A, C, G and T (or U) must occur, because proteins have stretches of one or two residues.
    """
    counts = Counter(character for character in sequence.upper() if character.isalpha())
    bases = {base: counts[base] for base in "ACGTUN"}
    present = (bases["A"] > 0) + (bases["C"] > 0) + (bases["G"] > 0) + (bases["T"] + bases["U"] > 0)
    return counts.total() >= _LEAST and present >= 3 and sum(bases.values()) >= 0.95 * counts.total()


def looks_like_text(sequence: str) -> bool:
    """Whether this is prose, of at least 20 letters: words of different lengths between blanks, or letters with the
    frequencies of English rather than of proteins, including B, J, O, U and Z, which proteins hardly have.

    FASTA readers drop the blanks of a sequence, so the letters alone must decide. Sequences written in groups of equal
    length, or letter by letter, are not prose.
    """
    counts = Counter(character for character in sequence.upper() if character in _ENGLISH)
    letters = counts.total()
    if letters < _LEAST:
        return False
    words = [word for word in sequence.split() if word[0].isalpha()]
    if len(words) >= 5 and len({len(word) for word in words[:-1]}) >= 3 and letters < 9 * len(words):
        return True
    evidence = sum(count * math.log(_ENGLISH[letter] / _SWISS_PROT[letter]) for letter, count in counts.items())
    return evidence > 3.0 and sum(counts[letter] for letter in "BJOUZ") >= max(3, 0.05 * letters)


def looks_like_alignment(sequences: Iterable[str]) -> bool:
    """Whether raw sequences of a file are rows of one alignment: aligned FASTA (all of one length, some with gaps), or
    a3m, in which lower-case letters are insertions that have no column.

    Examines the first 100 sequences. A single sequence is not an alignment.
    """
    columns: set[int] = set()
    lengths: set[int] = set()
    gaps = count = 0
    for sequence in islice(sequences, _LOOKED_AT):
        row = sequence.translate(_DROP_BLANKS)
        count += 1
        gaps += row.count("-") + row.count(".")
        # a3m and a2m: an insertion is a lower-case letter, or a dot where another row has one
        columns.add(sum(1 for c in row if c.isupper() or c in "-*"))
        # aligned FASTA: a dot is a gap like any other
        lengths.add(len(row))
        if min(len(columns), len(lengths)) > 1 or not columns - {0}:
            return False
    return count > 1 and gaps > 0


@dataclass(frozen=True)
class Alphabet:
    """A model's tokens in order, and the numbers of its special tokens; None where a model has no such token (T5 has
    neither `start` nor `mask`)."""

    tokens: tuple[str, ...]
    start: int | None
    end: int | None
    mask: int | None
    unknown: int
    pad: int = field(default=0)
    # between chains of a complex (ESM-C)
    chain_break: int | None = None
    # the residue that U, Z, O and B are read as; themselves where None
    rare_as: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def number(self, token: str) -> int:
        """The number of a token; the number of `unknown` if the model does not have the token."""
        return self._numbers.get(token, self.unknown)

    @property
    def before(self) -> int:
        """Tokens before the first residue."""
        return int(self.start is not None)

    @property
    def after(self) -> int:
        """Tokens after the last residue."""
        return int(self.end is not None)

    @property
    def around(self) -> int:
        """Tokens of a sequence that are not residues."""
        return self.before + self.after

    def residues(self, tokens: int) -> slice:
        """The places of the residues among the tokens of one sequence."""
        return slice(self.before, tokens - self.after)

    def encode(self, sequence: str) -> NDArray[np.int64]:
        """Start token, one token for each residue, end token: (len + around,). `sequence` is cleaned (`clean_protein`).

        Raises `SequenceError` for a character that cleaning would have changed or refused.
        """
        out = np.empty(len(sequence) + self.around, dtype=np.int64)
        if self.start is not None:
            out[0] = self.start
        if self.end is not None:
            out[-1] = self.end
        codes = np.frombuffer(sequence.encode("ascii", errors="replace"), dtype=np.uint8)
        residues = out[self.residues(len(out))]
        residues[:] = self._table[codes]
        if (residues < 0).any():
            place = int((residues < 0).argmax())
            raise SequenceError(
                f"expected a cleaned sequence of {STANDARD}{RARE}, got {sequence[place]!r} at position {place + 1}; "
                "clean it with longlens.io.alphabet.clean_protein"
            )
        return out

    def masked(self, token: int) -> int:
        """The token that hides `token`. Raises `InputError` if the model has none."""
        return self.require_mask()

    def by_residue(self, log_p: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-probabilities (P, V) of tokens with those of residues in the columns that `number` gives."""
        return log_p

    @property
    def settings(self) -> dict[str, str]:
        """What was chosen of how sequences are read, for the key and the manifest of a job; empty by default."""
        return {} if self.rare_as is None else {"rare_as": self.rare_as}

    def require_mask(self) -> int:
        """The number of the mask token. Raises `InputError` if the model has none."""
        if self.mask is None:
            raise InputError("expected a model with a mask token, got one without; it cannot hide a residue")
        return self.mask

    def decode(self, numbers: NDArray[np.int64]) -> str:
        """The tokens' names, joined."""
        return "".join(self.tokens[number] for number in numbers)

    @property
    def standard(self) -> NDArray[np.int64]:
        """The numbers of the 20 standard residues, in the order of `STANDARD`."""
        return self._table[np.frombuffer(STANDARD.encode(), dtype=np.uint8)]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        """Token number of each ASCII code; -1 for characters that are not residues."""
        kept = _KEPT if self.chain_break is None else _KEPT | {CHAIN_BREAK}
        rare = "" if self.rare_as is None else RARE
        as_read = ((chr(code), self.rare_as if chr(code) in rare else chr(code)) for code in range(128))
        return np.array([self.number(read or "") if raw in kept else -1 for raw, read in as_read], dtype=np.int64)


ESM = Alphabet(
    tokens=(
        *("<cls>", "<pad>", "<eos>", "<unk>"), *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>",
    ),
    start=0, pad=1, end=2, unknown=3, mask=32,
)  # fmt: skip
"""ESM-1b's and ESM-2's alphabet (Lin et al. 2023)."""
