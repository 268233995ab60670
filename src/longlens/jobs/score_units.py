"""The jobs that score variants: by marginals, by pseudo-perplexity, and all substitutions."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.alphabet import STANDARD, chain_breaks
from longlens.io.delimited import write_delimited
from longlens.io.results import ArraySpec, ResultFolder, write_whole
from longlens.io.variants import mutate
from longlens.jobs.inputs import ProteinSource
from longlens.jobs.job_key import ModelInfo, job_key
from longlens.jobs.plan import BatchOutputs, batch_bytes
from longlens.jobs.progress import StageProgress
from longlens.jobs.runner import Job, Rows, Unit, UnitMemory, described
from longlens.jobs.score import STRATEGIES, marginal_scores, position_log_probabilities
from longlens.jobs.variant_table import PROBLEM, ProteinVariants, VariantTable
from longlens.models.encoder import attend_with
from longlens.ops.registry import parse_method
from longlens.report.variants import save_substitutions

FILE = "scores.csv"
FIGURE = "scores.png"


@dataclass(frozen=True)
class ScoreOptions:
    """The options of scoring. `budget`: tokens of masked copies at a time; `offset`: number of the first residue."""

    strategy: str = "masked-marginals"
    method: str = "exact"
    budget: int = 16_384
    offset: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InputError(f"expected a scoring strategy of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        for name, value in (("tokens_per_batch", self.budget), ("offset_idx", self.offset)):
            if not isinstance(value, int):
                raise InputError(f"expected {name} as a whole number, got {value!r}")
        if self.budget < 1:
            raise InputError(f"expected at least 1 token to a batch, got {self.budget}")
        parse_method(self.method)


@dataclass
class ScoreJob(Job):
    """What all scoring jobs share: log-probabilities at positions of proteins, some at a time.

    A unit of work is as many positions of one protein (or one variant of it) as fit into a batch when each is masked in
    a separate copy, or, without masking, all positions of a protein. `limit`: bytes that it may take.
    """

    model: ModelInfo
    source: ProteinSource
    options: ScoreOptions
    limit: int

    @property
    def _options(self) -> dict[str, Any]:
        options = self.options
        return {"strategy": options.strategy, "method": str(parse_method(options.method)),
                "tokens_per_batch": options.budget, "offset": options.offset}  # fmt: skip

    @property
    def specs(self) -> list[ArraySpec]:
        return [ArraySpec("log_p", "place", (len(self.model.language_model.alphabet),))]

    @property
    def first_run_choices(self) -> dict[str, Any]:
        return {"model": self.model.name}

    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        model, entries = self.model.language_model, self.source.survey.entries
        sizes = (
            (entries[unit.first].length + 2, unit.stop - unit.start if self._masks else 1, unit.first)
            for unit in self.units(first_run_choices)
        )
        largest = max(sizes, key=lambda size: size[0] * size[1], default=None)
        if largest is None:
            # only wild types, or variants that are skipped
            return UnitMemory(0, "", "")
        length, copies, protein = largest
        outputs = BatchOutputs(0 if self._masks else len(model.alphabet), 0)
        need = batch_bytes(model.config, length * copies, model.dtype.itemsize, outputs)
        smaller = "use --dtype bfloat16 or a smaller model"
        if copies == 1:
            return UnitMemory(need, described(entries[protein]), smaller)
        budget = self.options.budget
        return UnitMemory(
            need,
            f"a batch of {length * copies:,} tokens of masked copies",
            f"lower --tokens-per-batch (now {budget:,}), {smaller}",
        )

    @property
    def _masks(self) -> bool:
        return self.options.strategy != "wt-marginals"

    def _chunks(self, protein: int, length: int, first: int, places: int, total: int) -> Iterator[Unit]:
        """Units for `places` positions of a protein of `length` residues: rows first..first + places of the array."""
        size = max(1, self.options.budget // (length + 2)) if self._masks else max(1, places)
        for start in range(first, first + places, size):
            stop = min(start + size, first + places)
            yield Unit(protein, protein + 1, StageProgress("score", stop, total, "positions"), start, stop)

    def _log_p(self, sequence: str, positions: Sequence[int]) -> NDArray[np.float32]:
        options = self.options
        return position_log_probabilities(
            self.model.language_model, sequence, positions, masked=self._masks,
            attend=attend_with(options.method), budget=options.budget,
        )  # fmt: skip


@dataclass
class VariantJob(ScoreJob):
    """Scores of the variants in a table, by marginals: one row for each mutated position of each protein."""

    variants: VariantTable

    @property
    def key(self) -> dict[str, Any]:
        table = self.variants.table
        text = json.dumps([table.columns, table.rows, self.variants.column, self.variants.protein_column])
        return job_key(self.model, self.source.survey, self._options | {
            "variants_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "on_error": "stop" if self.variants.problems is None else "skip", "column": self.column,
        })  # fmt: skip

    @cached_property
    def column(self) -> str:
        """The name of the column of scores."""
        return self.variants.new_column(self.model.name, self.options.strategy)

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each protein's group, and the end of the last."""
        return [0, *np.cumsum([len(group.positions) for group in self.variants.groups]).tolist()]

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        for group, (start, stop) in zip(self.variants.groups, pairwise(self.starts), strict=True):
            yield from self._chunks(group.protein, len(group.sequence), start, stop - start, self.starts[-1])

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Rows]:
        place = int(np.searchsorted(self.starts, unit.start, "right")) - 1
        first = self.starts[place]
        positions = self.variants.groups[place].positions[unit.start - first : unit.stop - first]
        yield "log_p", unit.start, self._log_p(texts[0], positions)

    def finish(self, folder: ResultFolder) -> list[Path]:
        table = folder.arrays["log_p"].read(self.starts[-1])
        cells = [""] * len(self.variants.table.rows)
        for place, group in enumerate(self.variants.groups):
            for row, score in zip(group.rows, self._scores(place, group, table), strict=True):
                cells[row] = f"{score:.6f}"
        columns: dict[str, Sequence[str]] = {self.column: cells}
        if self.variants.problems is not None:
            columns[PROBLEM] = self.variants.problems
        return [_written(folder, write_delimited(self.variants.table, columns))]

    def _scores(self, place: int, group: ProteinVariants, table: NDArray[Any]) -> NDArray[np.float64]:
        rows = table[self.starts[place] : self.starts[place + 1]]
        return marginal_scores(self.model.language_model, rows, group.positions, group.variants)


@dataclass
class PseudoPplJob(VariantJob):
    """Scores of variants by pseudo-log-likelihood: a row for each residue of each variant."""

    @property
    def specs(self) -> list[ArraySpec]:
        return [ArraySpec("log_p", "place", ())]

    @cached_property
    def owners(self) -> list[tuple[int, int]]:
        """Group, and number within the group, of each variant, in the order of the rows."""
        groups = self.variants.groups
        return [(place, number) for place, group in enumerate(groups) for number in range(len(group.variants))]

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each variant, and the end of the last."""
        lengths = [len(self.variants.groups[place].sequence) for place, _ in self.owners]
        return [0, *np.cumsum(lengths, dtype=np.int64).tolist()]

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        for (place, _), (start, stop) in zip(self.owners, pairwise(self.starts), strict=True):
            yield from self._chunks(
                self.variants.groups[place].protein, stop - start, start, stop - start, self.starts[-1]
            )

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Rows]:
        variant = int(np.searchsorted(self.starts, unit.start, "right")) - 1
        place, number = self.owners[variant]
        mutated = mutate(texts[0], self.variants.groups[place].variants[number])
        positions = range(unit.start - self.starts[variant], unit.stop - self.starts[variant])
        alphabet = self.model.language_model.alphabet
        tokens = alphabet.encode(mutated)
        truth = tokens[alphabet.residues(len(tokens))][positions.start : positions.stop]
        yield "log_p", unit.start, self._log_p(mutated, positions)[np.arange(len(truth)), truth]

    def _scores(self, place: int, group: ProteinVariants, table: NDArray[Any]) -> NDArray[np.float64]:
        numbers = [number for number, (owner, _) in enumerate(self.owners) if owner == place]
        residues = ~chain_breaks(group.sequence)
        sums = [
            table[self.starts[number] : self.starts[number + 1]][residues].sum(dtype=np.float64) for number in numbers
        ]
        return np.array(sums, np.float64)


@dataclass
class SubstitutionJob(ScoreJob):
    """Scores of all L x 20 substitutions of one protein; `figure`: also as a heat map."""

    figure: bool = False

    @property
    def key(self) -> dict[str, Any]:
        # a figure names the model
        drawn = {"figure": self.model.name} if self.figure else {}
        return job_key(self.model, self.source.survey, self._options | {"variants": "all"} | drawn)

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        length = self.source.survey.entries[0].length
        return self._chunks(0, length, 0, length, length)

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Rows]:
        yield "log_p", unit.start, self._log_p(texts[0], range(unit.start, unit.stop))

    def finish(self, folder: ResultFolder) -> list[Path]:
        (sequence,) = self.source.sequences()
        alphabet = self.model.language_model.alphabet
        table: NDArray[Any] = folder.arrays["log_p"].read(len(sequence))
        wild = np.array([alphabet.number(residue) for residue in sequence])
        scores = table[:, alphabet.standard] - table[np.arange(len(sequence)), wild][:, None]
        scores[chain_breaks(sequence)] = np.nan
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["position", "wild_type", *STANDARD])
        for place, (residue, row) in enumerate(zip(sequence, scores, strict=True)):
            writer.writerow([place + self.options.offset, residue, *(f"{value:.6f}" for value in row)])
        files = [_written(folder, text.getvalue())]
        if self.figure:
            title = ", ".join(filter(None, (self.source.survey.entries[0].id, self.model.name, self.options.strategy)))
            result_path = folder.work / FIGURE
            save_substitutions(scores, sequence, result_path, title=title, first=self.options.offset)
            files.append(folder.place(result_path))
        return files


def _written(folder: ResultFolder, text: str) -> Path:
    result_path = folder.work / FILE
    write_whole(result_path, text.encode())
    return folder.place(result_path)
