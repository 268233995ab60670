"""Fine-tuning as a function: `longlens.finetune`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.finetuning.outcome import REPORT, TEXT
from longlens.finetuning.splits import choose_kind, read_clusters
from longlens.finetuning.targets import Targets, make_targets, parse_task
from longlens.finetuning.trainer import TuneSettings
from longlens.io.fasta import FastaRecord
from longlens.io.targets import LabelledProtein, read_labelled
from longlens.jobs.finetune_job import FinetuneJob, FinetuneOptions
from longlens.jobs.fit_contacts import require_sklearn
from longlens.jobs.inputs import InMemoryProteins, readable_twice
from longlens.jobs.job_key import ModelInfo
from longlens.jobs.limits import load_model, memory_limit, threads_set
from longlens.jobs.output import OutputFolder, output_folder
from longlens.jobs.plan import BatchOutputs, batch_tokens
from longlens.jobs.predict import Predictions, predict
from longlens.jobs.progress import Notice, ProgressCallback, only_warnings
from longlens.jobs.runner import announce, run
from longlens.models.language_model import MaskedLM
from longlens.models.pretrained import refuse_unsavable
from longlens.report.tables import html_table


class FineTuned:
    """A fine-tuned model, in a folder (`folder`). `report` has what was measured, `text` the same as a table.

    tuned = longlens.finetune("solubility.csv", task="sequence_to_class", model="tiny", output="tuned")
    tuned.report["test"]["head"]["mcc"]["value"]
    tuned.predict({"new": "MKTAYIAK"}).to_frame()
    """

    def __init__(self, output: OutputFolder, base: MaskedLM | None) -> None:
        self._output, self._base = output, base
        self.folder: Path = output.path
        self.report: dict[str, Any] = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
        self.text = (self.folder / TEXT).read_text(encoding="utf-8")

    @property
    def warnings(self) -> list[str]:
        """What limits the measures, such as similar proteins on both sides of the split."""
        return list(self.report["warnings"])

    def measure(self, name: str, predictor: str | None = None) -> float:
        """A measure of test proteins, by default of the predictor that is kept."""
        try:
            return self.report["test"][predictor or self.report["method"]][name]["value"]
        except KeyError:
            raise InputError(f"expected a measure and a predictor of {self.text}\ngot {name}, {predictor}") from None

    def predict(self, proteins: Any, **options: Any) -> Predictions:
        """`longlens.predict` with this model."""
        return predict(proteins, model=self.folder, base=self._base, **options)

    def __repr__(self) -> str:
        return f"<{self.report['task']}, {self.report['method']}, in {self.folder}>"

    def _repr_html_(self) -> str:
        rows = self.report["test"]
        measures = list(next(iter(rows.values())))
        columns = {"": list(rows)} | {name: [found[name]["value"] for found in rows.values()] for name in measures}
        return html_table(columns, title=f"{self.report['task']}: test proteins", total=len(rows))


def finetune(
    file: str | Path,
    *,
    task: str,
    output: str | Path | None = None,
    model: str | Path | MaskedLM = "tiny",
    method: str = "head",
    labels: str | Path | None = None,
    target_col: str = "target",
    split: str = "auto",
    clusters: str | Path | None = None,
    settings: TuneSettings | None = None,
    max_memory: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback = only_warnings,
) -> FineTuned:
    """Learn a property of proteins or of residues from examples, and measure it on held-out proteins.

    A linear probe on the frozen vectors comes first and is always reported; then a head on the same vectors; then
    low-rank adaptation of the model itself.

    Args:
        file: FASTA with TARGET=, SET= and VALIDATION= in its headers, or a table (CSV, TSV, Parquet) with the columns
            id, sequence, target and, where wanted, set and mask.
        task: "sequence_to_class", "sequence_to_value", "residue_to_class" or "residue_to_value".
        output: a folder; an interrupted job in it continues. None: a temporary folder, which the result owns.
        model: a model, or what `longlens.load` takes.
        method: "probe", "head" or "lora": up to which stage; the last is kept.
        labels: a second file, of the targets of residues.
        target_col: the column of targets.
        split: "auto" (the given sets, otherwise by similarity), "given", "clusters" or "random".
        clusters: MMseqs2's table of clusters, used instead of the own comparison.
        settings: steps, rates, ranks, seed.
        max_memory: limit of the whole process, such as "16G"; None is 80 % of free memory.
        dtype, device: as `longlens.load` takes them.
        threads: number of PyTorch's threads; None does not change it.
        progress: is called with each event of the job; the default passes warnings on as `LonglensWarning`.

    Raises:
        InputError: a file or option that does not fit, a set or class without examples, scikit-learn is missing.
        CheckpointError: "lora" for a model that cannot be written.
    """
    require_sklearn()
    chosen, options_settings = parse_task(task), settings or TuneSettings()
    FinetuneOptions(method, split, options_settings)
    with threads_set(threads):
        proteins = _read(file, chosen.by_residue, not chosen.classes, labels, target_col, progress)
        kind = choose_kind(split, [protein.set for protein in proteins])
        targets = make_targets(chosen, proteins)
        given = None if clusters is None else read_clusters(Path(clusters), [p.record.id for p in proteins])
        loaded = load_model(model, dtype, device, max_memory)
        options = FinetuneOptions(method, kind, options_settings)
        job = _make_job(loaded, proteins, targets, options, max_memory, given, progress)
        with output_folder(output) as folder:
            run(job, folder.path, progress)
    return FineTuned(folder, loaded if isinstance(model, MaskedLM) else None)


def _make_job(
    loaded: MaskedLM, proteins: list[LabelledProtein], targets: Targets, options: FinetuneOptions,
    max_memory: str | None, clusters: NDArray[np.int64] | None, progress: ProgressCallback,
) -> FinetuneJob:  # fmt: skip
    """The job of a loaded model. Raises its errors before a folder is made."""
    if options.method == "lora":
        refuse_unsavable(loaded)
    source = InMemoryProteins(
        [FastaRecord(p.record.id, "", p.sequence, p.record.source, p.record.number) for p in proteins],
        skip_errors=False,
    )
    info = ModelInfo(loaded, loaded.source)
    announce(info, source.survey, progress)
    limit = memory_limit(loaded, max_memory)
    outputs = BatchOutputs(loaded.config.width, 1)
    budget = batch_tokens("auto", loaded.config, loaded.dtype.itemsize, limit, outputs)
    return FinetuneJob(info, source, proteins, targets, options, limit, budget, clusters, progress)


def _read(
    file: str | Path, by_residue: bool, numbers: bool, labels: str | Path | None, target_col: str,
    progress: ProgressCallback,
) -> list[LabelledProtein]:  # fmt: skip
    """The proteins with targets; those of SET=pred are left out."""
    with readable_twice([file]) as (path,):
        proteins = read_labelled(
            path, by_residue=by_residue, numbers=numbers, labels=None if labels is None else Path(labels),
            target_col=target_col,
        )  # fmt: skip
    kept: Sequence[LabelledProtein] = [protein for protein in proteins if protein.set != "predict"]
    if len(kept) < len(proteins):
        progress(Notice(f"{len(proteins) - len(kept):,} proteins of SET=pred are left out; give them to predict"))
    return list(kept)
