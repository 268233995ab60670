"""The job that computes how surprised a model is by a text: `longlens.surprise` and `longlens surprise`."""

from __future__ import annotations

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
from longlens.hf.documents import WordEdges, word_edges
from longlens.hf.surprise import MLP_CHUNK, TokenSurprise, read_masked, read_windows
from longlens.io.columns import columns_as, format_of
from longlens.io.results import FINISH, ArraySpec, ResultFolder, plain_json, write_whole
from longlens.jobs.job_key import ModelInfo, job_key
from longlens.jobs.limits import memory_limit, threads_set
from longlens.jobs.progress import ProgressCallback, only_warnings
from longlens.jobs.runner import Job, Rows, Unit, UnitMemory, announce, described, file_notes
from longlens.jobs.single_file import refuse_folder, run_to_file
from longlens.jobs.surprise_tables import BY, UNITS, SurprisedText, after_blank, summarise, table_by
from longlens.jobs.surprises import Surprise, draw_table
from longlens.jobs.text_reading import BUDGET, TextReading, check_windows, read_text_with
from longlens.jobs.texts import TextSource, load_language_model, opened_text
from longlens.ops.method import Method
from longlens.ops.registry import parse_method
from longlens.report import figures

FIGURE = "surprise.png"


@dataclass
class SurpriseJob(Job):
    """A unit of work is a batch of windows, or some tokens of a window that are masked in turn."""

    grad_mode: ClassVar[type[torch.inference_mode | torch.no_grad]] = torch.no_grad

    model: ModelInfo
    source: TextSource
    reading: TextReading
    method: str
    limit: int
    by: str
    unit: str
    format: str
    draws: bool

    @property
    def key(self) -> dict[str, Any]:
        finishing = {"by": self.by, "unit": self.unit, "format": self.format, "figure": self.draws}
        options = self.reading.options | {"words": self.by == "word", "method": self.method}
        return job_key(self.model, self.source.survey, options) | {FINISH: finishing}

    @property
    def specs(self) -> list[ArraySpec]:
        kinds = {"rank": "int64", "seen": "int64"}
        names = ("surprise", "entropy", "variance", "rank", "seen", "begins")
        arrays = [ArraySpec(name, "residue", (), kinds.get(name, "float64")) for name in names]
        return [*arrays, ArraySpec("end", "protein", (), "float64")]

    @cached_property
    def group(self) -> torch.Tensor | None:
        """The tokens that begin a word, where words are corrected."""
        if self.by != "word" or not self.reading.head.causal:
            return None
        return None if self._edges is None else self._edges.begins

    @cached_property
    def _edges(self) -> WordEdges | None:
        return word_edges(self.reading.model.tokenizer, len(self.reading.head.head.weight))

    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        advice = "read the text in windows (--context W --stride S), use --dtype bfloat16 or a smaller model"
        return UnitMemory(self.reading.bytes, described(self.source.survey.longest, "tokens"), advice)

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        return self.reading.units("surprise")

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Rows]:
        with attach(self.reading.model.model, self.method, mlp_chunk=MLP_CHUNK):
            found = self._read(unit.start, unit.stop)
        start = int(found.token[0])
        for spec in self.specs[:-1]:
            yield spec.name, start, getattr(found, spec.name)
        yield "end", 0, np.array([found.end])

    def _read(self, start: int, stop: int) -> TokenSurprise:
        reading = self.reading
        if reading.masking != "masked":
            return read_windows(reading.head, reading.document, reading.windows[start:stop], group=self.group)
        mask = reading.model.tokenizer.mask_token_id
        return read_masked(reading.head, reading.document, reading.window_of(start), start, stop, mask, BUDGET)

    def finish(self, folder: ResultFolder) -> list[Path]:
        found = self._found({spec.name: folder.arrays[spec.name] for spec in self.specs})
        table = table_by(found, self.by, self.unit)
        summary = self.described() | summarise(found)
        folder.describe({"summary": {name: plain_json(value) for name, value in summary.items()}})
        about = file_notes(self.model, folder) | {"by": self.by, "unit": self.unit, "summary": summary}
        path = folder.path / f"surprise.{self.format}"
        write_whole(path, columns_as(table, self.format, {name: plain_json(value) for name, value in about.items()}))
        if not self.draws:
            return [path]
        figure = draw_table(table, self.by, self.unit, f"surprise by {self.by}, {self.source.name}, {self.model.name}")
        return [path, *figures.save(figure, folder.path, Path(FIGURE).stem, ("png",))]

    def _found(self, arrays: dict[str, Any]) -> SurprisedText:
        document, count = self.reading.document, len(self.reading.document)
        columns: dict[str, NDArray[Any]] = {
            name: np.array(arrays[name].read(count)) for name in arrays if name != "end"
        }
        end = np.array(arrays["end"].read(1))
        begins = columns.pop("begins")
        begins = np.concatenate([begins, end])
        if self._edges is None:
            first = document.first_of_words()
        else:
            certain = after_blank(document.ids, self._edges.ends.numpy())
            first = self._edges.begins.numpy()[document.ids] | certain[:-1]
            begins[certain] = 0.0
        return SurprisedText(
            document.text, document.numbers, document.starts, document.stops, first_of_word=first,
            begins=None if self.group is None else begins, **columns,
        )  # fmt: skip

    def described(self) -> dict[str, Any]:
        """How the numbers were made, in words."""
        corrected = "of leading blanks" if self.group is not None else "none: sums over tokens"
        words = {"word_correction": corrected if self.by == "word" else None}
        return self.reading.described() | {"method": self.method} | words


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
    input: str = "auto",
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
        input: "auto", which refuses a file of proteins (FASTA), or "text".
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
    _check_request(by, unit, figure, target)
    check_windows(context, stride)
    with threads_set(threads), opened_text(source, input) as (text, name):
        loaded = load_language_model(model, name, dtype=dtype, device=device)
        reading = read_text_with(loaded, text, name, context=context, stride=stride, bos=bos, masking=masking)
        chosen_method = str(parse_method(method) if isinstance(method, str) else method)
        info = ModelInfo(loaded.model, str(model))
        job = SurpriseJob(
            info, TextSource(text, name, len(reading.document)), reading, chosen_method,
            memory_limit(loaded.model, max_memory), by, unit, chosen, figure,
        )  # fmt: skip
        announce(info, job.source.survey, progress)
        reading.announce(progress)
        beside = {FIGURE: target.with_suffix(".png")} if figure and target is not None else {}
        data, manifest = run_to_file(job, f"surprise.{chosen}", target, progress, beside)
    return Surprise(data, manifest)


def _check_request(by: str, unit: str, figure: bool, target: Path | None) -> None:
    """Refuse options that do not exist or do not fit together, before anything is read."""
    for name, value, known in (("by", by, BY), ("unit", unit, tuple(UNITS))):
        if value not in known:
            raise InputError(f"expected {name} of {', '.join(known)}, got {value!r}")
    if figure:
        figures.require_matplotlib()
        if target is None:
            raise InputError("a figure is drawn beside the file that --output names")
    if target is not None:
        refuse_folder(target)
