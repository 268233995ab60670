"""The job that applies a fine-tuned model: `longlens.predict` and `longlens predict`."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.finetuning.head import Head, head_outputs
from longlens.finetuning.outcome import prediction_columns
from longlens.finetuning.saved import FILE as HEAD
from longlens.finetuning.saved import HeadInfo, load_head
from longlens.io.results import ArraySpec, ResultFolder, write_whole
from longlens.jobs.base_model import load_base
from longlens.jobs.inference import refuse_overflow, residue_vectors
from longlens.jobs.inputs import Proteins, ProteinSource, open_proteins
from longlens.jobs.job_key import ModelInfo, job_key
from longlens.jobs.limits import memory_limit, threads_set
from longlens.jobs.plan import BatchOutputs, batch_bytes, batch_tokens, largest_batch, make_batches
from longlens.jobs.progress import Notice, ProgressCallback, only_warnings
from longlens.jobs.runner import Job, Rows, Unit, UnitMemory, announce, residue_units
from longlens.jobs.single_file import refuse_folder, run_to_file
from longlens.models.language_model import MaskedLM
from longlens.report.arrow import ArrowTable
from longlens.report.tables import html_table, to_frame

SUFFIXES = (".csv", ".tsv", ".parquet")


@dataclass
class PredictJob(Job):
    """A unit of work is a batch of proteins. `file`: the name of the result, whose suffix is its format."""

    model: ModelInfo
    source: ProteinSource
    head: Head
    info: HeadInfo
    head_sha256: str
    file: str
    limit: int
    budget: int

    @cached_property
    def lengths(self) -> list[int]:
        """Residues of each protein."""
        return [entry.length for entry in self.source.survey.entries]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The bounds of proteins among the rows."""
        counts = self.lengths if self.info.targets.task.by_residue else [1] * len(self.lengths)
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @property
    def key(self) -> dict[str, Any]:
        options = {"task": self.info.task, "head_sha256": self.head_sha256, "format": Path(self.file).suffix}
        return job_key(self.model, self.source.survey, options)

    @property
    def specs(self) -> list[ArraySpec]:
        axis = "residue" if self.info.targets.task.by_residue else "protein"
        return [ArraySpec("outputs", axis, (self.info.targets.outputs,))]

    @property
    def first_run_choices(self) -> dict[str, Any]:
        return {"tokens_per_batch": self.budget, "model": self.model.name}

    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        model = self.model.language_model
        tokens = largest_batch(self.lengths, int(first_run_choices["tokens_per_batch"]))
        # the head takes vectors in float32, three times over
        outputs = BatchOutputs(3 * model.config.width, 1)
        need = batch_bytes(model.config, tokens, model.dtype.itemsize, outputs)
        return UnitMemory(need, f"a batch of {tokens:,} tokens", "leave out the longest proteins", chosen=True)

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        batches = list(make_batches(self.lengths, int(first_run_choices["tokens_per_batch"])))
        yield from residue_units("predict", self.lengths, batches)

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Rows]:
        parts = head_outputs(self.head, residue_vectors(self.model.language_model, texts), self.info.targets)
        outputs = np.concatenate(parts).astype(np.float32)
        refuse_overflow(outputs, self.source.survey.entries[unit.first].id, self.model.dtype)
        yield "outputs", int(self.starts[unit.first]), outputs

    def finish(self, folder: ResultFolder) -> list[Path]:
        outputs = np.asarray(folder.arrays["outputs"].read(int(self.starts[-1])), np.float64)
        counts, ids = np.diff(self.starts), [entry.id for entry in self.source.survey.entries]
        columns: dict[str, Any] = {"id": np.repeat(np.array(ids, object), counts).tolist()}
        if self.info.targets.task.by_residue:
            columns["position"] = np.concatenate([np.arange(1, count + 1) for count in counts.tolist()])
            columns["residue"] = [residue for sequence in self.source.sequences() for residue in sequence]
        table = pa.table(columns | prediction_columns(self.info.targets, outputs, self.info.threshold))
        path, buffer = folder.work / self.file, io.BytesIO()
        if path.suffix == ".parquet":
            pq.write_table(table, buffer)
        else:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            options = pa_csv.WriteOptions(delimiter=delimiter, quoting_style="needed")
            pa_csv.write_csv(table, buffer, write_options=options)
        write_whole(path, buffer.getvalue())
        return [folder.place(path)]


class Predictions(ArrowTable):
    """Predictions of proteins or of residues, a row for each. `data` is the content of the file, `manifest` its origin.

    predictions["P12345"]                       # the class or value of a protein, or a list by residue
    predictions.to_frame()                      # pandas: ids, predictions, and probabilities of classes
    """

    def __init__(self, table: pa.Table, data: bytes, manifest: dict[str, Any]) -> None:
        self.table, self.data, self.manifest = table, data, manifest

    def __len__(self) -> int:
        return self.table.num_rows

    def _arrow(self) -> pa.Table:
        return self.table

    def columns(self) -> dict[str, list[Any]]:
        """The columns by name."""
        return self.table.to_pydict()

    def __getitem__(self, protein: str) -> Any:
        """A protein's class or value, or those of its residues. Raises `InputError` for an unknown id."""
        columns = self.columns()
        found = [value for name, value in zip(columns["id"], columns["predicted"], strict=True) if name == protein]
        if not found:
            raise InputError(f"expected the id of a protein that was predicted, got {protein!r}")
        return found if "position" in columns else found[0]

    def to_frame(self) -> Any:
        """A pandas data frame. Needs the extra `notebook`."""
        return to_frame(self.columns())

    def __repr__(self) -> str:
        return f"<{len(self):,} predictions by {self.manifest['model']['name']}>"

    def _repr_html_(self) -> str:
        return html_table(self.columns(), title=f"predictions by {self.manifest['model']['name']}", total=len(self))


def predict(
    proteins: Proteins,
    *,
    model: str | Path,
    output: str | Path | None = None,
    base: str | Path | MaskedLM | None = None,
    max_memory: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback = only_warnings,
) -> Predictions:
    """Apply what `longlens.finetune` learned to other proteins.

    Args:
        proteins: as `longlens.embed` takes them.
        model: the folder of a fine-tuning.
        output: a .csv, .tsv or .parquet file, with its manifest beside it; an interrupted job continues. None: no file.
        base: the model that was fine-tuned, where it is no longer where it was and the folder does not hold it.
        max_memory: limit of the whole process, such as "16G"; None is 80 % of free memory.
        dtype, device: as `longlens.load` takes them.
        threads: number of PyTorch's threads; None does not change it.
        progress: is called with each event of the job; the default passes warnings on as `LonglensWarning`.

    Raises:
        InputError: proteins that cannot be read or do not fit, an output of another format.
        CheckpointError: no fine-tuned model, or a base whose weights are not those that were fine-tuned.
    """
    target = None if output is None else Path(output)
    if target is not None:
        refuse_folder(target)
        if target.suffix not in SUFFIXES:
            raise InputError(f"expected an output of {', '.join(SUFFIXES)}, got {target}")
    folder = Path(model)
    head, info = load_head(folder)
    with threads_set(threads), open_proteins(proteins) as source:
        loaded = load_base(folder, info, base, dtype, device, max_memory)
        described = ModelInfo(loaded, loaded.source if info.base else str(folder))
        announce(described, source.survey, progress)
        if info.threshold is not None:
            progress(Notice(f"predicted is {info.classes[1]} where its probability is {info.threshold:.3f} or more, as "
                            "chosen on validation proteins"))  # fmt: skip
        limit = memory_limit(loaded, max_memory)
        outputs = BatchOutputs(3 * loaded.config.width, 1)
        budget = batch_tokens("auto", loaded.config, loaded.dtype.itemsize, limit, outputs)
        digest = hashlib.sha256((folder / HEAD).read_bytes()).hexdigest()
        file = f"predictions{'.csv' if target is None else target.suffix}"
        job = PredictJob(described, source, head.to(loaded.device), info, digest, file, limit, budget)
        data, manifest = run_to_file(job, file, target, progress)
    return Predictions(_read_table(data, Path(file).suffix, info), data, manifest)


def _read_table(data: bytes, suffix: str, info: HeadInfo) -> pa.Table:
    if suffix == ".parquet":
        return pq.read_table(io.BytesIO(data))
    text = {"id": pa.string(), "residue": pa.string()} | ({"predicted": pa.string()} if info.classes else {})
    convert = pa_csv.ConvertOptions(column_types=text)
    parse = pa_csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",")
    return pa_csv.read_csv(io.BytesIO(data), convert_options=convert, parse_options=parse)
