"""Tasks and their targets as numbers. The names of the tasks are those of biotrainer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError, SequenceError
from longlens.io.targets import LabelledProtein

# proteins that must have a class, so that each set can hold one
LEAST = 3
# the weight of a rare class is at most so many times that of a class of the mean size
CAP = 10.0
# size of the largest value, and one over their least spread: heads compute in float32
LARGEST = 1e30
_UNKNOWN = ("", "nan", "NaN", "NA", "None")


@dataclass(frozen=True)
class Task:
    """What is learned: a class or a value, of a protein or of each residue."""

    name: str
    by_residue: bool
    classes: bool


TASKS = {
    task.name: task
    for task in (
        Task("sequence_to_class", by_residue=False, classes=True),
        Task("sequence_to_value", by_residue=False, classes=False),
        Task("residue_to_class", by_residue=True, classes=True),
        Task("residue_to_value", by_residue=True, classes=False),
    )
}


def parse_task(name: str) -> Task:
    """The task of a name. Raises `InputError` for another name."""
    if name not in TASKS:
        raise InputError(f"expected a task of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


@dataclass(frozen=True)
class Targets:
    """The targets of proteins as numbers: (1,) or (L,) float64 for each, the number of the class or the value.

    NaN: not known. `classes`: of two, the rarer one is the second; more are in alphabetical order; empty for values.
    """

    task: Task
    values: list[NDArray[np.float64]]
    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Numbers that a head predicts: one for each class, or one."""
        return len(self.classes) if self.task.classes else 1


def make_targets(task: Task, proteins: Sequence[LabelledProtein]) -> Targets:
    """Targets as numbers.

    Raises `SequenceError` for a value that is no number or larger than `LARGEST` (with file and line), for values whose
    spread is 0 or less than one over it, for a single class, and for a class that fewer than `LEAST` proteins have.
    """
    if not task.classes:
        return Targets(task, _values(proteins), ())
    have: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    first: dict[str, str] = {}
    for protein in proteins:
        targets.update(protein.targets)
        for name in sorted(set(protein.targets) - {""}):
            have[name] += 1
            first.setdefault(name, protein.place)
    # the rarer of two is the one that is looked for: its threshold is chosen, and its curve measured
    classes = tuple(sorted(have, key=lambda name: (-targets[name] if len(have) == 2 else 0, name)))
    if len(classes) < 2:
        raise SequenceError(f"expected at least 2 classes, got {', '.join(classes) or 'none'}")
    rare = [name for name in classes if have[name] < LEAST]
    if rare:
        many = len(rare) > len(classes) // 2 and all(map(_is_number, classes))
        hint = f"; for numbers use {task.name.replace('class', 'value')}" if many else ""
        raise SequenceError(
            f"{first[rare[0]]}: expected each class in at least {LEAST} proteins, got {have[rare[0]]} with class "
            f"{rare[0]!r} ({len(rare)} of {len(classes)} classes have too few); add examples or join classes{hint}"
        )
    numbers = {name: float(number) for number, name in enumerate(classes)} | {"": math.nan}
    values = [np.array([numbers[name] for name in protein.targets], np.float64) for protein in proteins]
    return Targets(task, values, classes)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _values(proteins: Sequence[LabelledProtein]) -> list[NDArray[np.float64]]:
    values = [_numbers(protein) for protein in proteins]
    known = np.concatenate(values)
    spread, largest = float(np.nanstd(known)), float(np.nanmax(np.abs(known)))
    # the deviation of equal numbers is not always 0
    if spread <= 1e-12 * largest:
        raise SequenceError("expected values that differ, got the same value for all proteins")
    if spread < 1 / LARGEST:
        raise SequenceError(
            f"expected values that differ by more than {1 / LARGEST:.0e}, got a standard deviation of {spread:.1e}; "
            "give them in a smaller unit, or their logarithms"
        )
    return values


def _numbers(protein: LabelledProtein) -> NDArray[np.float64]:
    out = []
    for place, text in enumerate(protein.targets, 1):
        known = text not in _UNKNOWN
        if known and (not _is_number(text) or not math.isfinite(float(text))):
            residue = f" of residue {place}" if len(protein.targets) > 1 else ""
            raise SequenceError(f"{protein.place}: expected a number as target{residue}, got {text!r}")
        if known and abs(float(text)) > LARGEST:
            raise SequenceError(
                f"{protein.place}: expected a number between -{LARGEST:.0e} and {LARGEST:.0e} as target, got {text!r}; "
                "give targets in a larger unit, or their logarithms"
            )
        out.append(float(text) if known else math.nan)
    if all(map(math.isnan, out)):
        raise SequenceError(f"{protein.place}: expected a known target, got none")
    return np.array(out, np.float64)


def class_weights(targets: Targets, training: Sequence[int]) -> NDArray[np.float64]:
    """(C,): N / (C n_c) for a class with n_c of N training targets (by protein), at most `CAP` and of mean 1 over them.

    A class counts in a protein of residues by its share of them, as in the loss. Ones for values.
    """
    if not targets.task.classes:
        return np.ones(1)
    counts = np.zeros(len(targets.classes))
    for number in training:
        known = targets.values[number][~np.isnan(targets.values[number])].astype(np.int64)
        counts += np.bincount(known, minlength=len(counts)) / max(1, len(known))
    weights = np.minimum(counts.sum() / (len(counts) * np.maximum(counts, 1e-12)), CAP)
    return weights * counts.sum() / (weights * counts).sum()
