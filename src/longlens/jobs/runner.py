"""Run a job of any kind: checks, batches, progress, lock, journal, resuming and finishing.

A `Job` defines its units of work; `run` does the units that remain, each of which counts when its results are on the
disk, and then lets the job make its final files. After an interruption the same call continues, with the same bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.results import ArraySpec, ResultFolder, job_before, writing
from longlens.io.survey import RecordInfo, Survey
from longlens.jobs.inputs import ProteinSource, SequenceReader
from longlens.jobs.job_key import ModelInfo, machine, now, this_run, versions
from longlens.jobs.progress import Notice, ProgressCallback, StageProgress, only_warnings
from longlens.models.language_model import MaskedLM

# exit codes of the commands: finished except for skipped records; interrupted
SKIPPED = 3
INTERRUPTED = 130

Rows: TypeAlias = tuple[str, int, NDArray[Any]]
"""Array, first row, rows."""


@dataclass(frozen=True)
class Unit:
    """A unit of work on proteins `first`..`last` (exclusive); `start`..`stop` is a range of rows, as the job counts.

    `step` is reported when the unit is done.
    """

    first: int
    last: int
    step: StageProgress
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class UnitMemory:
    """The predicted memory of a job's largest unit of work: `bytes` beyond what the process holds before it.

    For the error where it does not fit, `unit` says which unit it is, and `advice` what takes less. `chosen`: whether
    it depends on the choices of the first run, so that the job may take less when it is begun again.
    """

    bytes: int
    unit: str
    advice: str
    chosen: bool = False


class Job(ABC):
    """The interface of a job to the runner. Everything is checked before a folder is made.

    `limit`: bytes that a unit of work may take (`longlens.jobs.limits.memory_limit`).
    """

    # the gradient mode of PyTorch in which units are computed
    grad_mode: ClassVar[type[torch.inference_mode | torch.no_grad]] = torch.inference_mode

    source: ProteinSource
    model: ModelInfo
    limit: int

    @property
    @abstractmethod
    def key(self) -> dict[str, Any]:
        """Everything that decides the results, as plain JSON."""

    @property
    def specs(self) -> list[ArraySpec]:
        """Arrays that are filled by the units."""
        return []

    @property
    def first_run_choices(self) -> dict[str, Any]:
        """Choices of the first run, such as the size of batches, that later runs of the same job take over."""
        return {}

    @property
    def about(self) -> dict[str, Any]:
        """The description of the results in the manifest, beside the key: the model, the proteins."""
        entries = self.source.survey.entries
        return {
            "model": self.model.described(),
            "proteins": {"ids": [entry.id for entry in entries], "lengths": [entry.length for entry in entries]},
        }

    @abstractmethod
    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        """The largest unit's memory with the choices of the first run."""

    @abstractmethod
    def units(self, first_run_choices: dict[str, Any]) -> Iterable[Unit]:
        """All units, in order; the same ones for the same `first_run_choices`."""

    @abstractmethod
    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Rows]:
        """Compute a unit: return rows for the arrays of `specs`, or move files whole into `folder`."""

    @abstractmethod
    def finish(self, folder: ResultFolder) -> list[Path]:
        """Make the final files from the results of the units, and return them."""


def run(job: Job, output: Path, progress: ProgressCallback = only_warnings) -> None:
    """Do the remaining units of a job in the folder `output`.

    Raises `InputError` if the folder holds another job or cannot be written, or if the job cannot be done, and
    `Interrupted` on Ctrl-C.
    """
    with writing(output):
        before = job_before(output, job.key)
        if before is None or not before["complete"]:
            _refuse_over_positions(job)
            _refuse_memory(job, before)
        if before is not None:
            _compare_machines(before.get("runs", []), progress)
        with closing(ResultFolder(output, job.key, job.specs, job.first_run_choices, job.about, this_run())) as folder:
            if folder.complete:
                progress(Notice(f"{output} is complete already: nothing is left to do"))
                return
            units = list(job.units(folder.first_run_choices))
            with interruptible(lambda: f"{folder.done():,} of {len(units):,} units of work are done"):
                _work(job, units, folder, progress)
                folder.finish(job.finish(folder), now())


def _refuse_over_positions(job: Job) -> None:
    """Raise `InputError` if a protein has more tokens than the model has positions."""
    if not isinstance(job.model.module, MaskedLM):
        # the tokenizer of a model of text knows its positions
        return
    most = job.model.module.config.max_length
    entry = job.source.survey.longest
    if most is not None and entry.length + 2 > most:
        raise InputError(
            f"{described(entry)}: expected at most {most - 2} residues for this model; use one without that limit"
        )


def _refuse_memory(job: Job, before: dict[str, Any] | None) -> None:
    """Raise `InputError` if the largest unit does not fit; `before`: the manifest of the run that began the job."""
    need = job.memory(job.first_run_choices if before is None else before["first_run_choices"])
    if need.bytes <= job.limit:
        return
    needs = (
        f"{need.unit}: needs about {need.bytes / 2**30:.2f} GiB beyond what the process has now, and "
        f"{job.limit / 2**30:.2f} GiB are allowed"
    )
    if before is None:
        raise InputError(f"{needs}; raise --max-memory, {need.advice}")
    again = "give another output to begin again in less memory" if need.chosen else need.advice
    raise InputError(f"{needs}; the job was begun with more. Raise --max-memory to continue it, or {again}")


def _work(job: Job, units: Sequence[Unit], folder: ResultFolder, progress: ProgressCallback) -> None:
    done = folder.done()
    if done:
        progress(Notice(f"{folder.path}: continuing after {done:,} of {len(units):,} units of work"))
        progress(units[done - 1].step)
    reader = SequenceReader(job.source)
    with job.grad_mode():
        for number, unit in enumerate(units[done:], done):
            texts = reader.take(unit.first, unit.last)
            for name, start, rows in job.compute(unit, texts, folder):
                folder.arrays[name].write(start, rows)
            folder.commit(number)
            progress(unit.step)


def _compare_machines(runs: Sequence[dict[str, Any]], progress: ProgressCallback) -> None:
    """Warn about another kind of machine, whose kernels round differently, so that results of both would be mixed."""
    kinds = [run["machine"] for run in runs if "machine" in run]
    if kinds and kinds[-1] != machine():
        progress(Notice(
            f"begun on another kind of machine ({_listed(kinds[-1])}) than this one ({_listed(machine())}); the last "
            "digits may differ from those of one uninterrupted run", warning=True,
        ))  # fmt: skip


def _listed(kind: dict[str, str]) -> str:
    return ", ".join(kind.values())


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a sentence for the user."""


@contextmanager
def interruptible(state: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, raise `Interrupted`, which says what is done and that the same command continues."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {state()}: run the same command again to continue") from None


# ---- functions that jobs share


def described(entry: RecordInfo, unit: str = "residues") -> str:
    """A record in an error message."""
    return f"{entry.source}, record {entry.number} ({entry.id}), {entry.length:,} {unit}"


def announce(model: ModelInfo, survey: Survey, progress: ProgressCallback) -> None:
    """Report the model and warnings about the input."""
    threads = torch.get_num_threads()
    progress(Notice(f"model {model.name} ({model.source}), {model.dtype} on {model.device}, "
                    f"{threads} thread{'s' if threads > 1 else ''}"))  # fmt: skip
    for warning in survey.warnings:
        progress(Notice(warning, warning=True))
    if survey.skipped:
        count = len(survey.skipped)
        counted = "1 record is skipped" if count == 1 else f"{count:,} records are skipped"
        progress(Notice(f"{counted}; the first: {survey.skipped[0].reason}", warning=True))


def residue_units(stage: str, lengths: Sequence[int], ranges: Sequence[tuple[int, int]]) -> Iterator[Unit]:
    """A unit for each range of proteins, which reports residues."""
    total, done = sum(lengths), 0
    for first, last in ranges:
        done += sum(lengths[first:last])
        yield Unit(first, last, StageProgress(stage, done, total))


def file_notes(model: ModelInfo, folder: ResultFolder) -> dict[str, str]:
    """The origin of the results, for their files; the same texts in every run of the job."""
    return {
        "model": str(folder.first_run_choices.get("model", model.name)),
        "model_sha256": model.sha256,
        "dtype": model.dtype,
        **{f"{name}_version": number for name, number in versions().items()},
    }
