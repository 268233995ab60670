"""Scores of ProteinGym's assays: `longlens.score_proteingym` and `longlens score --proteingym`.

Each assay is a job of its own in `by-model/MODEL/ASSAY` of the output, so that an interrupted run continues, and a
later run with another model adds a column.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.io.delimited import DelimitedTable, read_delimited, write_delimited
from longlens.io.proteingym import MUTANT, Assay, binary, check_assay, find_assays, measured, read_assay
from longlens.io.results import MANIFEST, read_manifest, write_whole, writing
from longlens.jobs.benchmark_scores import area_under_curve, rank_agreement, summary_rows
from longlens.jobs.inputs import ProteinSource, open_proteins
from longlens.jobs.job_key import ModelInfo
from longlens.jobs.limits import load_model, memory_limit, threads_set
from longlens.jobs.progress import Notice, ProgressCallback, only_warnings
from longlens.jobs.runner import announce, run
from longlens.jobs.score import refuse_unknown
from longlens.jobs.score_units import FILE, PseudoPplJob, ScoreOptions, VariantJob
from longlens.jobs.variant_table import PROBLEM, VariantTable, read_variants
from longlens.models.language_model import MaskedLM
from longlens.ops.method import Method
from longlens.report.arrow import ArrowTable, arrow_table
from longlens.report.tables import html_table, to_frame

BY_MODEL = "by-model"
ASSAYS, SUMMARY = "spearman.csv", "summary.csv"


class ProteinGymScores(ArrowTable):
    """Scores of assays in a folder (`folder`), by every model that was run in it.

    scores.assays                               # rows: assay, model, Spearman, area under the ROC curve, variants
    scores.summary                              # rows: model, group, mean Spearman, its error
    polars.DataFrame(scores)                    # `assays`
    """

    def __init__(self, folder: Path, assays: list[dict[str, Any]], summary: list[dict[str, Any]], skipped: int) -> None:
        self.folder, self.assays, self.summary, self.skipped = folder, assays, summary, skipped

    def spearman(self, model: str) -> float:
        """The mean over proteins and then selection types of a model. Raises `InputError` for an unknown one."""
        for row in self.summary:
            if (row["model"], row["kind"]) == (model, "all"):
                return float(row["spearman"])
        known = ", ".join(sorted({row["model"] for row in self.summary}))
        raise InputError(f"expected a model of {known}, got {model!r}")

    def columns(self) -> dict[str, Any]:
        """`assays` as columns."""
        return {name: [row[name] for row in self.assays] for name in self.assays[0]}

    def to_frame(self) -> Any:
        """`assays` as a pandas data frame. Needs the extra `notebook`."""
        return to_frame(self.columns())

    def _arrow(self) -> Any:
        return arrow_table(self.columns())

    def _repr_html_(self) -> str:
        columns = {name: [row[name] for row in self.summary] for name in self.summary[0]}
        return html_table(columns, title=f"ProteinGym: Spearman, in {self.folder}", total=len(self.summary))


def score_proteingym(
    assays: str | Path,
    *,
    output: str | Path,
    reference: str | Path | None = None,
    model: str | Path | MaskedLM = "tiny",
    scoring_strategy: str = "masked-marginals",
    on_error: str = "stop",
    tokens_per_batch: int = 16_384,
    max_memory: str | None = None,
    method: Method | str = "exact",
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback = only_warnings,
) -> ProteinGymScores:
    """Score the assays of ProteinGym, and compare the scores with the measurements.

    Args:
        assays: a folder of ProteinGym's tables, or one of them (`longlens.io.proteingym` has the columns).
        output: a folder for `<DMS_id>.csv` with a column for each model, `spearman.csv` and `summary.csv`; an
            interrupted run continues, and a run with another model adds its column.
        reference: ProteinGym's reference file; None: `DMS_substitutions.csv` in or near the folder.
        model, scoring_strategy, on_error, tokens_per_batch, max_memory, method, dtype, device, threads, progress: as
            `longlens.score` takes them.

    Raises:
        InputError: files without the columns, variants that do not fit the protein, a folder with other files.
    """
    options = ScoreOptions(scoring_strategy, str(method), tokens_per_batch)
    if on_error not in ("stop", "skip"):
        raise InputError(f"expected on_error 'stop' or 'skip', got {on_error!r}")
    folder, skip = Path(output), on_error == "skip"
    _refuse_folder(folder)
    found, warnings = find_assays(Path(assays), None if reference is None else Path(reference))
    for warning in warnings:
        progress(Notice(warning, warning=True))
    for assay in found:
        # all faults are reported before the model is loaded
        check_assay(assay, read_assay(assay.path))
        with open_proteins({assay.id: assay.target}) as source:
            _variants(assay, source, skip)
    with threads_set(threads):
        loaded = load_model(model, dtype, device, max_memory)
        loaded.require_head()
        info = ModelInfo(loaded, loaded.source)
        limit = memory_limit(loaded, max_memory)
        for number, assay in enumerate(found):
            with open_proteins({assay.id: assay.target}) as source:
                if number == 0:
                    announce(info, source.survey, progress)
                table = _variants(assay, source, skip)
                for group in table.groups:
                    for row, mutations in zip(group.rows, group.variants, strict=True):
                        refuse_unknown(loaded, mutations, table.table.place(row))
                kind = PseudoPplJob if scoring_strategy == "pseudo-ppl" else VariantJob
                run(kind(info, source, options, limit, table), folder / BY_MODEL / info.name / assay.id, progress)
    return _merged(folder, found)


def _refuse_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / BY_MODEL).is_dir())):
        raise InputError(f"expected {folder} to be empty, new or a result of --proteingym, found other files in it")


def _variants(assay: Assay, source: ProteinSource, skip: bool) -> VariantTable:
    return read_variants(assay.path, source, mutation_col=MUTANT, protein_col=None, offset=1, skip_errors=skip)


def _merged(folder: Path, assays: Sequence[Assay]) -> ProteinGymScores:
    """Write the tables of assays with a column for each model that has scored all of them, and the two summaries."""
    models = [path.name for path in sorted((folder / BY_MODEL).iterdir()) if _complete(path, assays)]
    values: dict[str, list[float]] = {model: [] for model in models}
    rows: list[dict[str, Any]] = []
    skipped = 0
    for assay in assays:
        table = read_assay(assay.path)
        columns: dict[str, Sequence[str]] = {}
        for model in models:
            cells, problems = _scored(folder / BY_MODEL / model / assay.id, table)
            columns[model if model not in table.columns else f"{model}_longlens"] = cells
            skipped += sum(problem != "" for problem in problems)
            scores = np.array([float(cell or "nan") for cell in cells])
            row = _agreement(assay, model, scores, table)
            values[model].append(row["spearman"])
            rows.append(row)
        with writing(folder):
            write_whole(folder / f"{assay.id}.csv", write_delimited(table, columns).encode())
    summary = [
        {"model": model, "kind": kind, "group": name, "spearman": mean, "error": error, "assays": count}
        for model in models for kind, name, mean, error, count in summary_rows(np.array(values[model]), assays)
    ]  # fmt: skip
    with writing(folder):
        write_whole(folder / ASSAYS, _csv(rows))
        write_whole(folder / SUMMARY, _csv(summary))
    return ProteinGymScores(folder, rows, summary, skipped)


def _complete(folder: Path, assays: Sequence[Assay]) -> bool:
    """Whether a model has scored all assays; one whose run was interrupted, or that scored others, has no column."""
    parts = [folder / assay.id for assay in assays]
    return all((part / MANIFEST).is_file() and read_manifest(part)["complete"] for part in parts)


def _scored(folder: Path, table: DelimitedTable) -> tuple[list[str], list[str]]:
    """The scores of an assay, as text, and why some are missing. Raises `InputError` if the assay has changed."""
    column = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["job"]["options"]["column"]
    scored = read_delimited(folder / FILE)
    if [row[MUTANT] for row in scored.rows] != [row[MUTANT] for row in table.rows]:
        raise InputError(f"{folder}: has scores of other variants than {table.name}; remove it to compute them again")
    return [row[column] for row in scored.rows], [row.get(PROBLEM, "") for row in scored.rows]


def _agreement(assay: Assay, model: str, scores: NDArray[np.float64], table: DelimitedTable) -> dict[str, Any]:
    truth, classes = measured(table), binary(table)
    return {
        "DMS_id": assay.id, "UniProt_ID": assay.uniprot, "coarse_selection_type": assay.selection, "taxon": assay.taxon,
        "model": model, "spearman": rank_agreement(scores, truth),
        "auc": float("nan") if classes is None else area_under_curve(scores, classes),
        "variants": int((np.isfinite(scores) & np.isfinite(truth)).sum()),
    }  # fmt: skip


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: f"{value:.6f}" if isinstance(value, float) else value for name, value in row.items()}
        writer.writerow({name: "" if cell == "nan" else cell for name, cell in cells.items()})
    return text.getvalue().encode()
