"""`longlens.context`: what carried a model's predictions, measured by prediction error."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from longlens.errors import InputError
from longlens.hf.documents import read_document
from longlens.hf.hiding import TextContext, text_bytes
from longlens.hf.language_heads import language_head, rope_warning
from longlens.jobs.context import ContextOptions
from longlens.jobs.context_job import ContextJob, SequencePlan, plan_sequence
from longlens.jobs.context_protein import ProteinContext, protein_bytes
from longlens.jobs.context_regions import (
    check_spans,
    chosen_targets,
    default_width,
    hidden_from,
    parse_ranges,
    read_bed,
    regular_spans,
)
from longlens.jobs.contexts import Contexts
from longlens.jobs.inputs import Proteins, ProteinSource, as_words, open_proteins
from longlens.jobs.job_key import ModelInfo
from longlens.jobs.limits import load_model, memory_limit, threads_set
from longlens.jobs.output import output_folder
from longlens.jobs.progress import Notice, ProgressCallback, only_warnings
from longlens.jobs.runner import announce, run
from longlens.jobs.text_reading import refuse_unpredictable
from longlens.jobs.texts import TextSource, load_language_model, opened_source
from longlens.lens.deletion import Hideable, Span
from longlens.models.language_model import MaskedLM
from longlens.report.figures import require_matplotlib

ByID: TypeAlias = dict[str, list[Span]] | None
Spans: TypeAlias = int | str | Path | Sequence[tuple[int, int]]


def context(
    source: Proteins,
    *,
    model: str | Path | MaskedLM = "tiny",
    output: str | Path | None = None,
    targets: int | str | Sequence[int | str] | None = None,
    most_surprising: int = 4,
    spans: Spans | None = None,
    exact: int | str = 8,
    halve: int = 1,
    curve: int = 64,
    input: str = "auto",
    figures: bool = True,
    tokens_per_batch: int = 16_384,
    max_memory: str | None = None,
    on_error: str = "stop",
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback = only_warnings,
) -> Contexts:
    """Which stretches of a sequence carried the predictions of some of its tokens: hide them, and predict again.

    found = longlens.context({"a": "MKTAYIAKQRQISFVKSHFSRQ"}, targets="F14", spans=4, figures=False)
    found["a"]["spans"]["exact"]                # nats of surprise that hiding each stretch adds

    The effect of each stretch is estimated to first order for all of them at once, and computed exactly for the
    strongest; docs/context.md has the formulas and what the estimate is worth.

    Args:
        source: proteins, as `longlens.embed` takes them, or a text: a file, or with `input` "text" the text itself.
        model: for proteins, what `longlens.load` takes; for a text, a transformers folder or a name on the hub. It
            needs a language model's head.
        output: a folder; an interrupted job in it continues. None: a temporary folder, which the result owns.
        targets: tokens whose prediction is explained: a number (27), a residue with its number ("K27"), a range
            ("10-20"), a word of the text, or several. None: the most surprising ones, for which each token is predicted
            first.
        most_surprising: how many, where `targets` is None.
        spans: the stretches: a width (stretches side by side), ranges with both ends ("10-20,40-60" or pairs), or a
            BED file with the ids of the sequences. None: a width of 4, or of a 64th of the sequence.
        exact: how many stretches are hidden in truth for each target, the strongest by the estimate; "all".
        halve: how many of these are halved, down to one token, to locate what carried the prediction.
        curve: tokens whose surprise is computed against the context that the model is given; 0: no curve.
        input: "proteins", "text", or "auto": proteins, unless it is a file that does not look like FASTA.
        figures: also draw figures.
        tokens_per_batch: tokens of copies computed at a time.
        max_memory: limit of the whole process, such as "16G"; None is 80 % of free memory.
        on_error: "stop", or "skip": records that cannot be read are left out, and listed in the manifest and the table.
        dtype, device: as `longlens.load` takes them.
        threads: number of PyTorch's threads; None does not change it.
        progress: is called with each event of the job; the default passes warnings on as `LonglensWarning`.

    Raises:
        InputError: a model without a head, targets or stretches that the sequence does not have, options that do not
            exist, a sequence that does not fit.
    """
    options = ContextOptions(
        None if targets is None else _words(targets), most_surprising, given_spans(spans),
        _exact(exact), halve, curve, tokens_per_batch, figures,
    )  # fmt: skip
    by_id = read_bed(Path(spans)) if isinstance(spans, str | Path) and _is_file(spans) else None
    if figures:
        require_matplotlib()
    with threads_set(threads), opened_source(source, input) as (text, proteins):
        if text is not None:
            job = _text_job(*text, model, dtype, device, max_memory, options, by_id, progress)
        else:
            with open_proteins(proteins, on_error=on_error) as opened:
                job = _protein_job(opened, model, dtype, device, max_memory, options, by_id)
        announce(job.model, job.source.survey, progress)
        _announce_cost(job.plans, progress)
        with output_folder(output) as folder:
            run(job, folder.path, progress)
    return Contexts(folder)


def _protein_job(
    source: ProteinSource, model: str | Path | MaskedLM, dtype: str, device: str, max_memory: str | None,
    options: ContextOptions, by_id: ByID,
) -> ContextJob:  # fmt: skip
    loaded = load_model(model, dtype, device, max_memory)
    # raises its error before a folder is made
    loaded.require_head()
    info = ModelInfo(loaded, loaded.source)

    def subject(text: str) -> Hideable:
        return ProteinContext(loaded, text, options.budget)

    plans = _plans(source, subject, options, by_id)
    widest = max(len(plan.spans) for plan in plans)
    need = protein_bytes(loaded, source.survey.longest.length + loaded.alphabet.around, options.budget, widest)
    return ContextJob(info, source, options, subject, plans, memory_limit(loaded, max_memory), need)


def _text_job(
    text: str, name: str, model: str | Path | MaskedLM, dtype: str, device: str, max_memory: str | None,
    options: ContextOptions, by_id: ByID, progress: ProgressCallback,
) -> ContextJob:  # fmt: skip
    if isinstance(model, MaskedLM):
        raise InputError(f"{name}: expected a model of text, got {model.source}, a model of proteins")
    loaded = load_language_model(model, name, dtype=dtype, device=device)
    head = language_head(loaded.model)
    document = read_document(loaded, text, name, causal=head.causal)
    refuse_unpredictable(loaded, document, name, causal=head.causal)
    tokens = len(document.inputs(0, len(document)))
    if loaded.longest is not None and tokens > loaded.longest:
        raise InputError(
            f"{name}: expected at most {loaded.longest:,} tokens, as many as {loaded.name} has positions, got "
            f"{tokens:,}; give a part of the text, or a model with more positions"
        )
    warning = rope_warning(loaded.model.config, tokens)
    if warning is not None:
        progress(Notice(warning.partition("; windows")[0], warning=True))
    info = ModelInfo(loaded.model, str(model))
    source = TextSource(text, name, tokens)
    # the cache of a target's prefix serves the steps of that target
    one = TextContext(loaded, head, document, options.budget)

    def subject(text: str) -> Hideable:
        one.begin()
        return one

    plans = _plans(source, subject, options, by_id)
    need = text_bytes(one, len(plans[0].spans))
    return ContextJob(info, source, options, subject, plans, memory_limit(loaded.model, max_memory), need)


def _plans(
    source: ProteinSource, subject: Callable[[str], Hideable], options: ContextOptions, by_id: ByID
) -> list[SequencePlan]:
    """The plan of each sequence; all faults of targets and stretches are found before anything is computed."""
    plans = []
    for entry, text in zip(source.survey.entries, source.sequences(), strict=True):
        where = f"{entry.source}, record {entry.number} ({entry.id or 'no name'})"
        sequence = subject(text)
        targets = None if options.targets is None else chosen_targets(sequence, options.targets, where)
        spans = _spans_of(sequence, entry.id, where, options, by_id)
        alone = [target for target in targets or () if not hidden_from(sequence, target, spans)]
        if alone:
            raise InputError(
                f"{where}: expected a stretch that can be hidden from the target {alone[0]}, got the target "
                f"{alone[0]} alone{' or what comes after it' if sequence.causal else ''}"
            )
        plans.append(plan_sequence(sequence, targets, spans, options))
    return plans


def _spans_of(sequence: Hideable, name: str, where: str, options: ContextOptions, by_id: ByID) -> list[Span]:
    if by_id is not None:
        if name not in by_id:
            raise InputError(f"{where}: expected a line with its id in the file of stretches, got {', '.join(by_id)}")
        return check_spans(sequence, by_id[name], where)
    if isinstance(options.spans, tuple):
        return check_spans(sequence, options.spans, where)
    able = [place for place, special in enumerate(sequence.special) if not special]
    width = default_width(len(able)) if options.spans is None else options.spans
    return regular_spans(able, width)


def given_spans(spans: Spans | None) -> int | tuple[Span, ...] | None:
    """What `spans` of `context` means: a width, ranges with exclusive ends, or None (also for a BED file).

    Raises `InputError`.
    """
    if spans is None:
        return None
    if isinstance(spans, bool | int):
        return _width(spans)
    if isinstance(spans, str | Path):
        if _is_file(spans):
            return None
        text = str(spans).strip()
        return _width(int(text)) if re.fullmatch(r"\d+", text) else tuple(parse_ranges(text, "spans"))
    try:
        pairs = [(int(first), int(last)) for first, last in spans]
    except (TypeError, ValueError):
        raise InputError(f"expected spans as a width, ranges or pairs of first and last, got {spans!r}") from None
    return tuple(parse_ranges(",".join(f"{first}-{last}" for first, last in pairs), "spans"))


def _width(width: int) -> int:
    if isinstance(width, bool) or width < 1:
        raise InputError(f"expected spans of at least 1 token, got {width!r}")
    return width


def _words(targets: int | str | Sequence[int | str]) -> tuple[str, ...]:
    return tuple(part for word in as_words(targets) for part in str(word).split(","))


def _is_file(spans: str | Path) -> bool:
    if isinstance(spans, Path) or spans.lower().endswith((".bed", ".bed.gz")):
        return True
    return re.fullmatch(r"[\d\s,-]*", spans) is None and Path(spans).exists()


def _exact(exact: int | str) -> int | None:
    if exact == "all":
        return None
    if isinstance(exact, int) or exact.isdigit():
        return int(exact)
    raise InputError(f"expected exact, how many stretches are hidden, as a whole number or 'all', got {exact!r}")


def _announce_cost(plans: Sequence[SequencePlan], progress: ProgressCallback) -> None:
    forward, backward, pieces = (
        sum(getattr(plan.predicted, name) for plan in plans) for name in ("forward", "backward", "pieces")
    )
    curve = f", and {pieces:,} tokens in pieces for the curve" if pieces else ""
    progress(Notice(
        f"this takes at most {forward:,} forward and {backward:,} backward passes of a whole sequence{curve}"
    ))  # fmt: skip
