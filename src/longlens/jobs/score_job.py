"""The job that scores variants: `longlens.score` and `longlens score`. Formulas: `longlens.jobs.score`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from longlens.errors import InputError
from longlens.jobs.inputs import Proteins, ProteinSource, open_proteins
from longlens.jobs.job_key import ModelInfo
from longlens.jobs.limits import chains_of, load_model, memory_limit, threads_set
from longlens.jobs.model_inputs import Structures, prepare_model
from longlens.jobs.progress import Notice, ProgressCallback, only_warnings
from longlens.jobs.runner import announce
from longlens.jobs.score import refuse_unknown
from longlens.jobs.score_models import combine_substitutions, combine_variants, mean_column, run_models
from longlens.jobs.score_units import FIGURE, FILE, PseudoPplJob, ScoreJob, ScoreOptions, SubstitutionJob, VariantJob
from longlens.jobs.scores import Scores, Substitutions
from longlens.jobs.single_file import refuse_folder, run_to_file
from longlens.jobs.variant_table import VariantTable, read_variants, refuse_several
from longlens.models.language_model import MaskedLM
from longlens.ops.method import Method
from longlens.report.figures import require_matplotlib


def score(
    proteins: Proteins,
    variants: str | Path | Sequence[str] | None = None,
    *,
    model: str | Path | MaskedLM | Sequence[str | Path | MaskedLM] = "tiny",
    output: str | Path | None = None,
    scoring_strategy: str = "masked-marginals",
    mutation_col: str = "mutant",
    protein_col: str | None = None,
    offset_idx: int = 1,
    on_error: str = "stop",
    tokens_per_batch: int = 16_384,
    figure: bool = False,
    max_memory: str | None = None,
    method: Method | str = "exact",
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    structures: Structures | None = None,
    min_plddt: float | None = None,
    rare_as_x: bool = False,
    progress: ProgressCallback = only_warnings,
) -> Scores | Substitutions:
    """Zero-shot effects of variants from a model's predictions; higher is better tolerated.

    longlens.score("MKTAYIAK", ["K2A", "K2A:T3S"]).scores      # (2,)
    longlens.score("MKTAYIAK").matrix                          # (8, 20): every substitution

    Args:
        proteins: as `longlens.embed` takes them.
        variants: a CSV or TSV file with a column of variants, or a list of them: "K2A", "K2A:T3S", "p.Lys2Ala", "WT".
            None: all substitutions of one protein.
        model: a model, or what `longlens.load` takes; a list of several, such as ESM-1v's five: a column for each and
            one of their means, which is the result, or the mean of their matrices.
        output: a CSV file, with its manifest beside it; an interrupted job continues. None: no file.
        scoring_strategy: "masked-marginals", "wt-marginals" or "pseudo-ppl" (`longlens.jobs.score`).
        mutation_col, protein_col: columns of the variants and, where there are several proteins, of their ids.
        offset_idx: number of the first residue.
        on_error: "stop", or "skip": variants that cannot be scored get a reason and no score.
        tokens_per_batch: of masked copies at a time.
        figure: also draw all substitutions as a heat map: the output's name with .png.
        max_memory: limit of the whole process, such as "16G"; None is 80 % of free memory.
        method: method of attention, an object or its string form.
        dtype, device: as `longlens.load` takes them.
        threads: number of PyTorch's threads; None does not change it.
        structures, min_plddt, rare_as_x: as `longlens.embed` takes them. SaProt's probability of a residue is the sum
            over its structure letters, and a hidden residue keeps its own.
        progress: is called with each event of the job; the default passes warnings on as `LonglensWarning`.

    Raises:
        InputError: options that do not exist, a protein or variant that cannot be read, proteins that do not fit.
    """
    options = ScoreOptions(scoring_strategy, str(method), tokens_per_batch, offset_idx)
    _check_request(proteins, variants, output, scoring_strategy, on_error, figure)
    if isinstance(model, list | tuple) and (not model or figure):
        raise InputError(
            "a figure is drawn of one model's scores" if model else "expected at least one model, got none"
        )
    several = tuple(model) if isinstance(model, list | tuple) else (model,)
    with threads_set(threads), open_proteins(proteins, chains=chains_of(*several)) as source:
        table = None
        if variants is None:
            refuse_several(source, "all substitutions are scored for one protein at a time")
        else:
            # all faults of the table are reported before the model is loaded
            table = read_variants(
                variants, source, mutation_col=mutation_col, protein_col=protein_col, offset=offset_idx,
                skip_errors=on_error == "skip",
            )  # fmt: skip
        _announce_cleaning(source, progress)
        columns: list[str] = []

        def make(of: str | Path | MaskedLM) -> ScoreJob:
            loaded = load_model(of, dtype, device, max_memory)
            loaded = prepare_model(loaded, source, structures, min_plddt, rare_as_x=rare_as_x)
            job = _make_job(loaded, source, table, options, memory_limit(loaded, max_memory), figure, progress)
            columns.append(job.column if isinstance(job, VariantJob) else "")
            return job

        target = None if output is None else Path(output)
        if isinstance(model, list | tuple):
            combine = combine_substitutions
            if table is not None:
                combine = partial(combine_variants, table, scoring_strategy, columns)
            text, manifest = run_models(model, make, FILE, target, progress, combine)
            column = "" if table is None else mean_column(table, scoring_strategy)
        else:
            beside = {FIGURE: target.with_suffix(".png")} if figure and target is not None else {}
            data, manifest = run_to_file(make(model), FILE, target, progress, beside)  # type: ignore[arg-type]
            text, column = data.decode(), columns[0]
    if table is None:
        return Substitutions(text, manifest, next(iter(source.sequences())), offset_idx)
    return Scores(text, manifest, column, table)


def _make_job(
    loaded: MaskedLM, source: ProteinSource, table: VariantTable | None, options: ScoreOptions, limit: int,
    figure: bool, progress: ProgressCallback,
) -> ScoreJob:  # fmt: skip
    """The job of one model. Raises its errors before a folder is made."""
    loaded.require_head()
    info = ModelInfo(loaded, loaded.source)
    announce(info, source.survey, progress)
    if table is None:
        return SubstitutionJob(info, source, options, limit, figure)
    _refuse_unknown(loaded, table)
    kind = PseudoPplJob if options.strategy == "pseudo-ppl" else VariantJob
    job = kind(info, source, options, limit, table)
    assert job.column
    return job


def _check_request(
    proteins: Proteins,
    variants: str | Path | Sequence[str] | None,
    output: str | Path | None,
    strategy: str,
    on_error: str,
    figure: bool,
) -> None:
    """Refuse options of `score` that do not fit together, before anything is read."""
    if variants is None and strategy == "pseudo-ppl":
        raise InputError(
            "all substitutions take wt-marginals or masked-marginals: pseudo-ppl would need L x 20 x L passes"
        )
    if figure:
        require_matplotlib()
        if variants is not None or output is None:
            raise InputError("a figure is drawn of all substitutions (--all), beside the file that --output names")
        if Path(output).suffix == ".png":
            raise InputError(f"expected the output to be a table, such as scores.csv, got {output}, the figure's name")
    if output is not None:
        refuse_folder(Path(output))
    if on_error not in ("stop", "skip"):
        raise InputError(f"expected on_error 'stop' or 'skip', got {on_error!r}")
    sources = proteins if isinstance(proteins, list | tuple) else [proteins]
    if str(variants) == "-" and "-" in map(str, sources):
        raise InputError("expected either the variants or the proteins on standard input, got both")


def _refuse_unknown(model: MaskedLM, table: VariantTable) -> None:
    for group in table.groups:
        for row, mutations in zip(group.rows, group.variants, strict=True):
            refuse_unknown(model, mutations, table.table.place(row))


def _announce_cleaning(source: ProteinSource, progress: ProgressCallback) -> None:
    """Report gaps and changed residues, since positions are counted in the cleaned protein."""
    for entry in source.survey.entries:
        place = f"{entry.source}, record {entry.number} ({entry.id or 'no name'})"
        if entry.gaps:
            progress(Notice(f"{place}: {entry.gaps} gaps are left out; positions count without them", warning=True))
        if entry.substituted:
            progress(Notice(f"{place}: {entry.substituted} residues (J, inner *) are read as X", warning=True))
