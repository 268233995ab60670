"""The job that compares the predictions of two language models of a text: `longlens.compare_models` and
`longlens compare-models`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.hf import attach
from longlens.hf.surprise import MLP_CHUNK, TokenVectors, masked_vectors, window_vectors
from longlens.hf.texts import TextModel
from longlens.io.columns import columns_as, format_of
from longlens.io.results import ArraySpec, ResultFolder, plain_json, write_whole
from longlens.jobs.comparisons import Comparison
from longlens.jobs.job_key import ModelInfo, job_key
from longlens.jobs.limits import memory_limit, threads_set
from longlens.jobs.progress import Notice, ProgressCallback, only_warnings
from longlens.jobs.runner import Job, Rows, Unit, UnitMemory, announce, described, file_notes
from longlens.jobs.single_file import refuse_folder, run_to_file
from longlens.jobs.surprise_tables import block_error
from longlens.jobs.text_reading import BUDGET, TextReading, check_windows, read_text_with
from longlens.jobs.texts import TextSource, load_language_model, opened_text
from longlens.lens.predict.divergence import divergence
from longlens.lens.predict.vocabulary import Head
from longlens.ops.method import Method
from longlens.ops.registry import parse_method

# column -> field of `Divergence`
FIELDS = {
    "surprise_a": "surprise_p", "surprise_b": "surprise_q", "entropy_a": "entropy_p", "entropy_b": "entropy_q",
    "kl_ab": "kl_pq", "kl_ba": "kl_qp", "agree": "agree",
}  # fmt: skip


@dataclass
class CompareJob(Job):
    """A unit of work is a batch of windows, read by both models, or some tokens that are masked in turn."""

    grad_mode: ClassVar[type[torch.inference_mode | torch.no_grad]] = torch.no_grad

    model: ModelInfo
    other: ModelInfo
    source: TextSource
    readings: tuple[TextReading, TextReading]
    method: str
    limit: int
    format: str

    @property
    def key(self) -> dict[str, Any]:
        options = self.readings[0].options | {"method": self.method, "format": self.format}
        other = {"sha256": self.other.sha256, "dtype": self.other.dtype}
        return job_key(self.model, self.source.survey, options) | {"other": other}

    @property
    def about(self) -> dict[str, Any]:
        return super().about | {"other": self.other.described()}

    @property
    def specs(self) -> list[ArraySpec]:
        return [ArraySpec(name, "residue", (), "int64" if name in ("seen", "agree") else "float64")
                for name in ("seen", *FIELDS)]  # fmt: skip

    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        # the vectors of the first model are held while the second one runs
        first, second = self.readings
        held = first.length * first.head.head.weight.shape[1] * first.head.head.weight.element_size()
        advice = "read the text in windows (--context W --stride S), use --dtype bfloat16 or smaller models"
        need = max(first.bytes, second.bytes) + 2 * held
        return UnitMemory(need, described(self.source.survey.longest, "tokens"), advice)

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        return self.readings[0].units("compare")

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Rows]:
        first, second = (self._vectors(reading, unit.start, unit.stop) for reading in self.readings)
        heads = _of_one_size([reading.head.head for reading in self.readings])
        found = divergence(first.hidden, heads[0], second.hidden, heads[1], first.targets)
        start = int(first.token[0])
        yield "seen", start, first.seen
        for name, field in FIELDS.items():
            values = getattr(found, field).cpu().numpy()
            yield name, start, np.where(first.without, 0 if name == "agree" else np.nan, values)

    def _vectors(self, reading: TextReading, start: int, stop: int) -> TokenVectors:
        with attach(reading.model.model, self.method, mlp_chunk=MLP_CHUNK):
            if reading.masking != "masked":
                return window_vectors(reading.head, reading.document, reading.windows[start:stop])
            mask = reading.model.tokenizer.mask_token_id
            window = reading.window_of(start)
            return masked_vectors(reading.head, reading.document, window, start, stop, mask, BUDGET)

    def finish(self, folder: ResultFolder) -> list[Path]:
        document = self.readings[0].document
        arrays = {name: np.array(folder.arrays[name].read(len(document))) for name in ("seen", *FIELDS)}
        summary = self.readings[0].described() | {"method": self.method} | summarise(arrays)
        folder.describe({"summary": plain_json(summary)})
        seen, agree = arrays.pop("seen"), arrays.pop("agree")
        table: dict[str, Any] = {
            "token": document.numbers, "text": document.pieces, "start": document.starts,
            "stop": document.stops, **arrays, "difference": arrays["surprise_b"] - arrays["surprise_a"],
            "agree": agree, "seen": seen,
        }  # fmt: skip
        about = file_notes(self.model, folder) | {"other": self.other.name, "other_sha256": self.other.sha256}
        path = folder.path / f"comparison.{self.format}"
        write_whole(path, columns_as(table, self.format, plain_json(about | {"summary": summary})))
        return [path]


def summarise(arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Means over the tokens that have a prediction, in nats, with errors by `block_error`."""
    known = ~np.isnan(arrays["surprise_a"])
    columns = {name: array[known] for name, array in arrays.items()}
    columns["difference"] = columns["surprise_b"] - columns["surprise_a"]
    summary: dict[str, Any] = {"tokens": len(known), "predicted": int(known.sum())}
    for name in ("surprise_a", "surprise_b", "difference", "kl_ab", "kl_ba"):
        values = columns[name].astype(np.float64)
        summary[f"mean_{name}"] = float(values.mean()) if len(values) else math.nan
        summary[f"mean_{name}_error"] = block_error(values)
    summary["same_first_choice"] = float(columns["agree"].mean()) if known.any() else math.nan
    return summary


def _of_one_size(heads: list[Head]) -> list[Head]:
    """Heads of the tokens that both have: rows beyond the tokenizer's tokens pad some models' tables."""
    rows = min(len(head.weight) for head in heads)
    return [
        Head(head.weight[:rows], None if head.bias is None else head.bias[:rows], head.transform, head.softcap)
        for head in heads
    ]


def compare_models(
    model: str | Path,
    other: str | Path,
    source: str | Path,
    *,
    output: str | Path | None = None,
    format: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    masking: str | None = None,
    input: str = "auto",
    max_memory: str | None = None,
    method: Method | str = "exact",
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback = only_warnings,
) -> Comparison:
    """How the predictions of two language models of one tokenizer differ, for each token of a text.

    found = longlens.compare_models("gpt2", "my-fine-tuned-gpt2", "text.txt")
    found["kl_ab"], found["difference"]         # KL(a||b), surprise of b minus that of a, nats

    Both heads are walked in one sweep, so that neither model's logits are held for all tokens
    (`longlens.lens.predict.divergence`). Both models are causal, or both masked.

    Args:
        model, other: transformers folders, or names on the Hugging Face hub: models a and b.
        source: a text file, "-" (standard input), or the text itself, if no file has that name.
        output: a .csv, .tsv, .parquet or .json file, with its manifest beside it. None: no file.
        format, context, stride, bos, masking, input: of the table and the reading, as `longlens.surprise` takes them.
        max_memory, method, dtype, device, threads, progress: likewise.

    Raises:
        InputError: models of different tokenizers or kinds; and as `longlens.surprise`.
        CheckpointError, UnsupportedError: as `longlens.surprise`.
    """
    target, chosen = None if output is None else Path(output), format_of(output, format)
    check_windows(context, stride)
    if target is not None:
        refuse_folder(target)
    with threads_set(threads), opened_text(source, input) as (text, name):
        pair = [load_language_model(each, name, dtype=dtype, device=device) for each in (model, other)]
        _refuse_other_tokenizer(*pair)
        first, second = (
            read_text_with(each, text, name, context=context, stride=stride, bos=bos, masking=masking) for each in pair
        )
        _refuse_other_tokens(first, second)
        infos = [ModelInfo(each.model, str(given)) for each, given in zip(pair, (model, other), strict=True)]
        job = CompareJob(
            infos[0], infos[1], TextSource(text, name, len(first.document)), (first, second),
            str(parse_method(method) if isinstance(method, str) else method),
            memory_limit(pair[0].model, max_memory), chosen,
        )  # fmt: skip
        _announce(job, infos, progress)
        data, manifest = run_to_file(job, f"comparison.{chosen}", target, progress)
    return Comparison(data, manifest)


def _announce(job: CompareJob, infos: Sequence[ModelInfo], progress: ProgressCallback) -> None:
    """Say what is compared, and on which tokens."""
    for info in infos:
        announce(info, job.source.survey, progress)
    sizes = [len(reading.head.head.weight) for reading in job.readings]
    if sizes[0] != sizes[1]:
        progress(Notice(
            f"the models' heads have {sizes[0]:,} and {sizes[1]:,} rows; both are compared on the first "
            f"{min(sizes):,}, which hold all tokens of the tokenizer", warning=True,
        ))  # fmt: skip
    for reading in job.readings:
        reading.announce(progress)


def _refuse_other_tokenizer(first: TextModel, second: TextModel) -> None:
    if first.tokenizer.get_vocab() != second.tokenizer.get_vocab():
        raise InputError(
            f"expected two models of one tokenizer, got {first.name} ({len(first.tokenizer):,} tokens) and "
            f"{second.name} ({len(second.tokenizer):,}), whose tokens differ; compare bits per byte of longlens "
            "surprise instead"
        )


def _refuse_other_tokens(first: TextReading, second: TextReading) -> None:
    names = [reading.model.name for reading in (first, second)]
    if first.head.causal != second.head.causal:
        kinds = ["causal" if reading.head.causal else "masked" for reading in (first, second)]
        raise InputError(f"expected two causal or two masked models, got {names[0]} ({kinds[0]}) and {names[1]} "
                         f"({kinds[1]})")  # fmt: skip
    one, two = first.document, second.document
    if (one.before, one.after) != (two.before, two.after) or not np.array_equal(one.ids, two.ids):
        raise InputError(
            f"expected two models of one tokenizer, got {names[0]} and {names[1]}, which cut this text into different "
            "tokens or put other special tokens around it; compare bits per byte of longlens surprise instead"
        )
    rows = min(len(reading.head.head.weight) for reading in (first, second))
    if rows < len(first.model.tokenizer):
        raise InputError(
            f"expected heads of at least {len(first.model.tokenizer):,} rows, as many as the tokenizer has tokens, got "
            f"{rows:,}"
        )
