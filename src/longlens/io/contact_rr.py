"""Predicted contacts in CASP's format RR (https://predictioncenter.org/casp14/index.cgi?page=format).

A line "i j 0 8 p" says that the C-beta atoms of the residues i < j, from 1, are less than 8 Angstrom apart with
probability p.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError

SUFFIX = ".rr"
# pairs written at a time
STRETCH = 2**16


@dataclass(frozen=True)
class RRFile:
    """`target`: the protein's name, `sequence`: its residues, "" where the file has none; `i` < `j` (M,) from 1;
    `probability` (M,)."""

    target: str
    sequence: str
    i: NDArray[np.int64]
    j: NDArray[np.int64]
    probability: NDArray[np.float64]


def write_rr(path: Path, i: NDArray[Any], j: NDArray[Any], probability: NDArray[Any], about: Mapping[str, str]) -> None:
    """Write pairs, residues from 0, each once and the most probable first. `about`: the model and the protein's id.

    Memory is a few numbers for each pair.
    """
    first, second = np.minimum(i, j).astype(np.int64), np.maximum(i, j).astype(np.int64)
    _, places = np.unique(first * (int(second.max(initial=0)) + 1) + second, return_index=True)
    # equal probabilities in the order of the residues
    places = places[np.argsort(-np.asarray(probability)[places], kind="stable")]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        target = re.sub(r"\s+", "_", about.get("id", "")) or "unknown"
        file.write(f"PFRMAT RR\nTARGET {target}\nAUTHOR longlens\nMETHOD {about.get('model', '')}\nMODEL 1\n")
        for start in range(0, len(places), STRETCH):
            file.writelines(
                f"{first[place] + 1} {second[place] + 1} 0 8 {float(probability[place]):.5f}\n"
                for place in places[start : start + STRETCH].tolist()
            )
        file.write("END\n")


def count_rr(path: Path) -> int:
    """The number of pairs in a file."""
    with path.open(encoding="utf-8") as file:
        return sum(line[:1].isdigit() for line in file)


def read_rr(path: Path) -> RRFile:
    """The pairs of the first model of a file; none in one that has only a header.

    Raises `InputError` for other lines; the message gives the line.
    """
    target, sequence, headed = "", [], False
    rows: list[tuple[int, int, float]] = []
    for number, words in _lines(path):
        where = f"{path}, line {number}"
        if words[0] == "TARGET" and len(words) > 1:
            target = words[1]
        elif words[0] in ("END", "ENDMDL"):
            break
        elif words[0] in ("PFRMAT", "AUTHOR", "METHOD", "REMARK", "MODEL", "TARGET"):
            headed = headed or words[:2] == ["PFRMAT", "RR"]
            if words[0] == "PFRMAT" and not headed:
                raise InputError(f"{where}: expected PFRMAT RR, got {' '.join(words)}")
        elif len(words) == 1 and words[0].isalpha() and not rows:
            sequence.append(words[0].upper())
        else:
            rows.append(_pair(words, where))
    if not rows and not headed:
        raise InputError(f"{path}: expected pairs in CASP's format RR, found none")
    table = np.array(rows, np.float64).reshape(-1, 3)
    return RRFile(target, "".join(sequence), table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2])


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if words := line.split():
                    yield number, words
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected pairs in CASP's format RR; it cannot be read ({error})") from None


def _pair(words: list[str], where: str) -> tuple[int, int, float]:
    try:
        i, j, probability = int(words[0]), int(words[1]), float(words[-1])
        if len(words) != 5 or not 1 <= i < j or not 0 <= probability <= 1:
            raise ValueError
    except (ValueError, IndexError):
        raise InputError(
            f'{where}: expected a pair "i j 0 8 p" with 1 <= i < j and p in 0..1, got {" ".join(words)!r}'
        ) from None
    return i, j, probability
