"""The job that computes how surprised a model is by a text: `longlens.surprise` and `longlens surprise`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.hf import attach
from longlens.hf.documents import Document, Window, beginnings, read_document, windows
from longlens.hf.language_heads import LanguageHead, language_head, rope_warning
from longlens.hf.surprise import MLP_CHUNK, TokenSurprise, read_masked, read_windows
from longlens.hf.texts import TextModel
from longlens.io.columns import columns_as, format_of
from longlens.io.results import FINISH, ArraySpec, ResultFolder, write_whole
from longlens.jobs.job_key import ModelInfo, job_key
from longlens.jobs.limits import memory_limit, threads_set
from longlens.jobs.progress import Notice, ProgressCallback, StageProgress, only_warnings
from longlens.jobs.runner import Job, Rows, Unit, UnitMemory, announce, described, file_notes
from longlens.jobs.single_file import refuse_folder, run_to_file
from longlens.jobs.surprise_tables import BY, UNITS, SurprisedText, summarise, table_by
from longlens.jobs.surprises import Surprise, draw_table
from longlens.jobs.texts import TextSource, load_language_model, opened_text
from longlens.lens.predict.vocabulary import HELD
from longlens.ops.method import Method
from longlens.ops.registry import parse_method
from longlens.report import figures

FIGURE = "surprise.png"
MASKING = ("masked", "in-place")
# tokens of windows, or of masked copies, at a time
BUDGET = 16_384
# (T, d) tensors that a pass holds at its peak: the stream, its norm, queries, keys and values twice, the output twice
HELD_WIDTHS = 12
# blocks of logits, and their temporaries
HELD_LOGITS = 6


@dataclass(frozen=True)
class SurpriseOptions:
    """The options of `surprise` that decide its numbers. `masking` is None for a causal model, `context` (tokens, with
    special ones) and `stride` None for the whole text at once."""

    context: int | None
    stride: int | None
    masking: str | None
    start_token: int | None
    words: bool
    method: str


@dataclass
class SurpriseJob(Job):
    """A unit of work is a batch of windows, or some tokens of a window that are masked in turn."""

    grad_mode: ClassVar[type[torch.inference_mode | torch.no_grad]] = torch.no_grad

    model: ModelInfo
    source: TextSource
    text_model: TextModel
    head: LanguageHead
    document: Document
    options: SurpriseOptions
    limit: int
    by: str
    unit: str
    format: str
    draws: bool

    @property
    def key(self) -> dict[str, Any]:
        finishing = {"by": self.by, "unit": self.unit, "format": self.format, "figure": self.draws}
        return job_key(self.model, self.source.survey, vars(self.options)) | {FINISH: finishing}

    @property
    def specs(self) -> list[ArraySpec]:
        kinds = {"rank": "int64", "seen": "int64"}
        names = ("surprise", "entropy", "variance", "rank", "seen", "begins")
        arrays = [ArraySpec(name, "residue", (), kinds.get(name, "float64")) for name in names]
        return [*arrays, ArraySpec("end", "protein", (), "float64")]

    @cached_property
    def windows(self) -> list[Window]:
        """The windows of the text; one where the whole is read at once."""
        count, around = len(self.document), len(self.document.before) + len(self.document.after)
        size = count if self.options.context is None else self.options.context - around
        stride = size if self.options.stride is None else self.options.stride
        return windows(count, size, stride, causal=self.head.causal)

    @cached_property
    def group(self) -> torch.Tensor | None:
        """The tokens that begin a word, where words are corrected."""
        if not (self.options.words and self.head.causal):
            return None
        return beginnings(self.text_model.tokenizer, len(self.head.head.weight))

    @property
    def _tokens(self) -> int:
        """Tokens that the model gets at once."""
        window = self.windows[0]
        one = len(self.document.inputs(window.start, window.stop))
        return max(one, min(BUDGET, one * len(self.windows)) if self.options.masking != "masked" else BUDGET)

    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        weight = self.head.head.weight
        config: Any = self.text_model.model.config
        wide = 3 * (getattr(config, "intermediate_size", None) or 4 * weight.shape[1])
        element = weight.element_size()
        passing = HELD_WIDTHS * self._tokens * weight.shape[1] + min(self._tokens, MLP_CHUNK) * wide
        need = passing * element + HELD_LOGITS * 4 * HELD
        advice = "read the text in windows (--context W --stride S), use --dtype bfloat16 or a smaller model"
        return UnitMemory(need, described(self.source.survey.longest, "tokens"), advice)

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        total, done = len(self.document), 0
        for start, stop in self._parts():
            done += stop - start if self.options.masking == "masked" else sum(
                window.last - window.first for window in self.windows[start:stop]
            )  # fmt: skip
            yield Unit(0, 1, StageProgress("surprise", done, total, "tokens"), start, stop)

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Ranges of windows; of tokens, where each is masked in turn."""
        window = self.windows[0]
        size = max(1, BUDGET // len(self.document.inputs(window.start, window.stop)))
        if self.options.masking != "masked":
            yield from ((at, min(at + size, len(self.windows))) for at in range(0, len(self.windows), size))
            return
        for window in self.windows:
            yield from ((at, min(at + size, window.last)) for at in range(window.first, window.last, size))

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Rows]:
        with attach(self.text_model.model, self.options.method, mlp_chunk=MLP_CHUNK):
            found = self._read(unit.start, unit.stop)
        start = int(found.token[0])
        for spec in self.specs[:-1]:
            yield spec.name, start, getattr(found, spec.name)
        yield "end", 0, np.array([found.end])

    def _read(self, start: int, stop: int) -> TokenSurprise:
        if self.options.masking != "masked":
            return read_windows(self.head, self.document, self.windows[start:stop], group=self.group)
        window = next(window for window in self.windows if window.first <= start < window.last)
        mask = self.text_model.tokenizer.mask_token_id
        return read_masked(self.head, self.document, window, start, stop, mask, BUDGET)

    def finish(self, folder: ResultFolder) -> list[Path]:
        found = self._found({spec.name: folder.arrays[spec.name] for spec in self.specs})
        table = table_by(found, self.by, self.unit)
        summary = self.described() | summarise(found)
        folder.describe({"summary": {name: _plain(value) for name, value in summary.items()}})
        about = file_notes(self.model, folder) | {"by": self.by, "unit": self.unit, "summary": summary}
        path = folder.path / f"surprise.{self.format}"
        write_whole(path, columns_as(table, self.format, {name: _plain(value) for name, value in about.items()}))
        if not self.draws:
            return [path]
        figure = draw_table(table, self.by, self.unit, f"surprise by {self.by}, {self.source.name}, {self.model.name}")
        return [path, *figures.save(figure, folder.path, Path(FIGURE).stem, ("png",))]

    def _found(self, arrays: dict[str, Any]) -> SurprisedText:
        document, count = self.document, len(self.document)
        columns: dict[str, NDArray[Any]] = {
            name: np.array(arrays[name].read(count)) for name in arrays if name != "end"
        }
        end = np.array(arrays["end"].read(1))
        begins = columns.pop("begins")
        tokens = beginnings(self.text_model.tokenizer, len(self.head.head.weight))
        first = document.first_of_words() if tokens is None else tokens.numpy()[document.ids]
        return SurprisedText(
            document.text, document.starts, document.stops, first_of_word=first,
            begins=None if self.group is None else np.concatenate([begins, end]), **columns,
        )  # fmt: skip

    def described(self) -> dict[str, Any]:
        """How the numbers were made, in words."""
        options, tokenizer = self.options, self.text_model.tokenizer
        kind = "causal" if self.head.causal else f"masked model, {MADE[options.masking or 'masked']}"
        around = self.document.before + self.document.after
        names = " ".join(map(str, tokenizer.convert_ids_to_tokens(list(around)))) if around else "none"
        corrected = "of leading blanks" if self.group is not None else "none: sums over tokens"
        size = len(self.document) + len(around) if options.context is None else options.context
        return {
            "kind": kind, "special_tokens": names, "context": "whole text" if len(self.windows) == 1 else size,
            "stride": None if len(self.windows) == 1 else options.stride or self.windows[0].stop,
            "method": options.method, "word_correction": corrected if self.by == "word" else None,
        }  # fmt: skip


MADE = {"masked": "each token masked in turn", "in-place": "in place: the model sees the token"}


def _plain(value: Any) -> Any:
    """A value for JSON, which has no NaN."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def surprise(
    source: str | Path,
    *,
    model: str | Path,
    output: str | Path | None = None,
    by: str = "token",
    unit: str = "nats",
    format: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    masking: str | None = None,
    figure: bool = False,
    max_memory: str | None = None,
    method: Method | str = "exact",
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback = only_warnings,
) -> Surprise:
    """How surprised a causal or masked language model is by a text: by token, word or line.

    longlens.surprise("The fox jumps over the dog.", model="gpt2").summary["bits_per_byte"]

    The whole text is the context, in memory linear in its tokens; logits are made a few tokens at a time. Formulas:
    `longlens.jobs.surprise_tables`, `longlens.lens.predict.vocabulary`.

    Args:
        source: a text file, "-" (standard input), or the text itself, if no file has that name.
        model: a transformers folder, or a name on the Hugging Face hub, of a model with a language model's head.
        output: a .csv, .tsv, .parquet or .json file, with its manifest beside it; an interrupted job continues. None:
            no file.
        by: "token", "word" (with the correction for tokenizers of leading blanks) or "line".
        unit: "nats" or "bits", of surprise and entropy in the table.
        format: of the content where there is no output: csv, tsv, parquet or json.
        context, stride: tokens of a window, with special ones, and from one window to the next. None: the whole text.
            A token has its surprise from the first window that has it; in a masked model from the one in whose middle
            it is nearer. The column `seen` counts the tokens of the text that the model had.
        bos: whether a causal model gets its start token before each window; None: if its tokenizer has one. Without it
            the first token has no surprise.
        masking: of a masked model: "masked" (the default), each token masked in turn, or "in-place", one pass.
        figure: also draw surprise along the text: the output's name with .png.
        max_memory: limit of the whole process, such as "16G"; None is 80 % of free memory.
        method: method of attention, an object or its string form.
        dtype, device: as `longlens.load` takes them.
        threads: number of PyTorch's threads; None does not change it.
        progress: is called with each event of the job; the default passes warnings on as `LonglensWarning`.

    Raises:
        InputError: options that do not exist, a text that cannot be read or has more tokens than the model has
            positions, a model without a language model's head.
        CheckpointError: no model of that name, or one that cannot be read.
        UnsupportedError: an encoder with a decoder, or a model that longlens cannot attach or read the head of.
    """
    target, chosen = None if output is None else Path(output), format_of(output, format)
    _check_request(by, unit, masking, context, stride, figure, target)
    with threads_set(threads), opened_text(source) as (text, name):
        loaded = load_language_model(model, name, dtype=dtype, device=device)
        head = language_head(loaded.model)
        masking = _masking(loaded, head, masking, bos)
        document = read_document(loaded, text, name, causal=head.causal, bos=bos)
        _refuse_over_positions(loaded, document, context, name, masking)
        _refuse_small_context(document, context, stride, name)
        options = SurpriseOptions(
            context, stride, masking, document.before[0] if head.causal and document.before else None, by == "word",
            str(parse_method(method) if isinstance(method, str) else method),
        )  # fmt: skip
        info = ModelInfo(loaded.model, str(model))
        job = SurpriseJob(
            info, TextSource(text, name, len(document)), loaded, head, document, options,
            memory_limit(loaded.model, max_memory), by, unit, chosen, figure,
        )  # fmt: skip
        announce(info, job.source.survey, progress)
        _announce(job, progress)
        beside = {FIGURE: target.with_suffix(".png")} if figure and target is not None else {}
        data, manifest = run_to_file(job, f"surprise.{chosen}", target, progress, beside)
    return Surprise(data, manifest)


def _check_request(
    by: str, unit: str, masking: str | None, context: int | None, stride: int | None, figure: bool, target: Path | None
) -> None:
    """Refuse options that do not exist or do not fit together, before anything is read."""
    for name, value, known in (("by", by, BY), ("unit", unit, tuple(UNITS)), ("masking", masking, (*MASKING, None))):
        if value not in known:
            raise InputError(f"expected {name} of {', '.join(filter(None, known))}, got {value!r}")
    if (context is None) != (stride is None):
        raise InputError("expected --context and --stride together: tokens of a window, and from one to the next")
    for name, number in (("context", context), ("stride", stride)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise InputError(f"expected --{name} as a number of tokens of at least 1, got {number!r}")
    if figure:
        figures.require_matplotlib()
        if target is None:
            raise InputError("a figure is drawn beside the file that --output names")
    if target is not None:
        refuse_folder(target)


def _masking(model: TextModel, head: LanguageHead, masking: str | None, bos: bool | None) -> str | None:
    if head.causal:
        if masking is not None:
            raise InputError(f"{model.name} is a causal model, which predicts each token from those before it: leave "
                             "out --surprise")  # fmt: skip
        return None
    if bos is not None:
        raise InputError(
            f"{model.name} is a masked model, which gets its tokenizer's special tokens: leave out --bos and --no-bos"
        )
    if masking != "in-place" and model.tokenizer.mask_token_id is None:
        raise InputError(f"{model.name}: its tokenizer has no mask token; ask for --surprise in-place")
    return masking or "masked"


def _refuse_over_positions(
    model: TextModel, document: Document, context: int | None, name: str, masking: str | None
) -> None:
    count = len(document) + len(document.before) + len(document.after)
    tokens = count if context is None else min(context, count)
    if model.longest is None or tokens <= model.longest:
        return
    if context is None:
        raise InputError(
            f"{name}: expected at most {model.longest:,} tokens, as many as {model.name} has positions, got {count:,}; "
            f"read it in windows, --context {model.longest} --stride {max(1, model.longest // 2)}, or give a model "
            "with more positions"
        )
    raise InputError(
        f"expected a --context of at most {model.longest:,} tokens, as many as {model.name} has positions, got "
        f"{context:,}"
    )


def _refuse_small_context(document: Document, context: int | None, stride: int | None, name: str) -> None:
    around = len(document.before) + len(document.after)
    if context is None or stride is None:
        return
    least = stride + around + (0 if around else 1)
    if context < least:
        raise InputError(
            f"{name}: expected a --context of at least {least} tokens for a --stride of {stride}, since {around} of "
            f"each window are special tokens and every token needs one before it, got {context}"
        )


def _announce(job: SurpriseJob, progress: ProgressCallback) -> None:
    window = job.windows[0]
    tokens = len(job.document.inputs(window.start, window.stop))
    warning = rope_warning(job.text_model.model.config, tokens)
    # windows of one length have one set of frequencies
    if warning is not None and len(job.windows) == 1:
        progress(Notice(warning, warning=True))
    if job.options.masking == "masked":
        passes = sum(window.last - window.first for window in job.windows)
        progress(Notice(f"each of {passes:,} tokens is masked in a copy of its window of {tokens:,} tokens"))
