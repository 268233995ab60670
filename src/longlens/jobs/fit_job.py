"""The job that fits a contact head to structures: `longlens contacts fit`. The regression is in `fit_contacts`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.fasta import FastaRecord
from longlens.io.results import FINISH, ArraySpec, ResultFolder, writing
from longlens.io.structures import ProteinContacts
from longlens.jobs.fit_contacts import (
    FitOptions,
    FittedHead,
    SampledFeatures,
    fit_samples,
    pair_features,
    read_examples,
    require_sklearn,
    sample_examples,
    save_head,
)
from longlens.jobs.inputs import InMemoryProteins, ProteinSource
from longlens.jobs.job_key import ModelInfo, job_key
from longlens.jobs.limits import load_model, memory_limit, threads_set
from longlens.jobs.plan import SHARE, BatchOutputs, batch_bytes, free_bytes
from longlens.jobs.progress import ProgressCallback, StageProgress, only_warnings
from longlens.jobs.runner import Job, Rows, Unit, UnitMemory, announce, described
from longlens.jobs.single_file import RefusedResultError, run_to_file
from longlens.lens.contacts import feature_bytes
from longlens.models.language_model import MaskedLM

FILE = "head.safetensors"
# bytes for each number of the table of features, while scikit-learn and liblinear copy it
FITTING = 44


@dataclass
class FitJob(Job):
    """A unit of work is one protein: the features of its sampled pairs. `limit`: bytes that it, or the regression, may
    take. `fitted` is set when the head is fitted."""

    model: ModelInfo
    source: ProteinSource
    examples: Sequence[ProteinContacts]
    options: FitOptions
    limit: int
    fitted: FittedHead | None = field(default=None, init=False)

    @property
    def key(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.ascontiguousarray(example.contacts, np.int64).tobytes())
        options = asdict(self.options)
        # features do not depend on it, so that a fit that was refused for it can be repeated with another
        finishing = {"strength": options.pop("strength")}
        key = job_key(self.model, self.source.survey, options | {"contacts_sha256": digest.hexdigest()})
        return key | {FINISH: finishing}

    @property
    def specs(self) -> list[ArraySpec]:
        config = self.model.language_model.config
        return [ArraySpec("features", "pair", (config.layers * config.heads,))]

    @cached_property
    def samples(self) -> list[tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]]:
        """Each protein's pairs, whether they are in contact, and how many pairs each represents."""
        return sample_examples(self.examples, self.options)

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each protein's pairs, and the end of the last."""
        return [0, *np.cumsum([len(pairs) for pairs, _, _ in self.samples], dtype=np.int64).tolist()]

    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        model, longest = self.model.language_model, self.source.survey.longest
        pairs = max(len(pairs) for pairs, _, _ in self.samples)
        need = batch_bytes(model.config, longest.length + 2, model.dtype.itemsize, BatchOutputs(0, 0))
        config = model.config
        need += feature_bytes(config.layers, config.heads, config.head_width, longest.length, pairs)
        fitting = self.starts[-1] * config.layers * config.heads * FITTING
        if self.model.device.type != "cpu":
            # the regression is in the host's memory, and `limit` is of the device
            host = int(SHARE * free_bytes(torch.device("cpu")))
            if fitting > host:
                raise InputError(
                    f"the regression over {self.starts[-1]:,} pairs needs about {fitting / 2**30:.2f} GiB of the "
                    f"host's memory, of which {host / 2**30:.2f} GiB may be used; lower --negatives"
                )
        elif fitting > need:
            return UnitMemory(fitting, f"the regression over {self.starts[-1]:,} pairs", "lower --negatives")
        return UnitMemory(need, described(longest), "use --dtype bfloat16 or a smaller model")

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        total = len(self.examples)
        return (Unit(place, place + 1, StageProgress("pairs", place + 1, total, "proteins")) for place in range(total))

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Rows]:
        pairs, _, _ = self.samples[unit.first]
        features = pair_features(self.model.language_model, texts[0], torch.from_numpy(pairs))
        yield "features", self.starts[unit.first], features.numpy()

    def finish(self, folder: ResultFolder) -> list[Path]:
        table: NDArray[Any] = folder.arrays["features"].read(self.starts[-1])
        samples = [
            SampledFeatures(example.sequence, *sampled, np.array(table[start:stop]))
            for example, sampled, start, stop in zip(
                self.examples, self.samples, self.starts[:-1], self.starts[1:], strict=True
            )
        ]
        try:
            self.fitted = fit_samples(self.model.language_model, samples, self.options)
        except InputError as error:
            raise RefusedResultError(str(error)) from None
        save_head(self.model.language_model, self.fitted, folder.work / FILE)
        return [folder.place(folder.work / FILE)]


def fit_contacts(
    structures: Sequence[str | Path],
    *,
    output: str | Path,
    fasta: str | Path | None = None,
    model: str | Path | MaskedLM = "tiny",
    options: FitOptions | None = None,
    max_memory: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback = only_warnings,
) -> FitJob:
    """Fit a contact head to structures or lists of contacts, and write it to `output`; an interrupted job continues.

    `max_memory` is the limit of the whole process, such as "16G"; None is 80 % of free memory. Raises `InputError` for
    files that cannot be read, proteins that the model cannot take or that do not fit, or a head without predictive
    power.
    """
    require_sklearn()
    target = Path(output)
    with threads_set(threads):
        examples = read_examples([Path(name) for name in structures], None if fasta is None else Path(fasta))
        if not examples:
            raise InputError("expected proteins with contacts, got none")
        records = [
            FastaRecord(example.id, "", example.sequence, "structures", number)
            for number, example in enumerate(examples, 1)
        ]
        source = InMemoryProteins(records, skip_errors=False)
        loaded = load_model(model, dtype, device, max_memory)
        info = ModelInfo(loaded, loaded.source)
        announce(info, source.survey, progress)
        job = FitJob(info, source, examples, options or FitOptions(), memory_limit(loaded, max_memory))
        with writing(target):
            target.absolute().parent.mkdir(parents=True, exist_ok=True)
        run_to_file(job, FILE, target, progress)
    return job
