"""Proteins to vectors, logits and surprise: `longlens embed`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.errors import InputError
from longlens.io.formats import FORMATS, Finished, write_arrays
from longlens.io.results import ArraySpec, ResultFolder, sync_tree
from longlens.io.survey import Entry, Survey, read_cleaned
from longlens.io.table import write_table
from longlens.jobs.inference import Place, masked_predictions, residue_predictions, residue_rows
from longlens.jobs.job_key import job_identity, refuse_changed
from longlens.jobs.plan import Outputs, batch_bytes, make_batches
from longlens.lens.predict.vocabulary import Predictions
from longlens.models.encoder import Attend, attend_with
from longlens.models.language_model import MaskedLM
from longlens.ops.registry import parse_method

INCLUDES = ("mean", "per-tok", "bos", "logits", "surprise")
SURPRISE = ("surprise", "entropy", "excess", "rank")


@dataclass(frozen=True)
class EmbedOptions:
    """What to compute. `layers` count from 0 (the embedding); -1 is the last.

    `surprise`: "wt" sees each residue while predicting it (one pass), "masked" hides it (one pass for each residue).
    """

    include: tuple[str, ...] = ("mean",)
    layers: tuple[int, ...] = (-1,)
    format: str = "h5"
    surprise: str = "wt"
    method: str = "exact"
    array_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, given, known in (
            ("include", self.include, INCLUDES),
            ("format", (self.format,), FORMATS),
            ("surprise", (self.surprise,), ("wt", "masked")),
            ("array dtype", (self.array_dtype,), ("float32", "float16")),
        ):
            odd = [value for value in given if value not in known]
            if odd or not given:
                raise InputError(f"expected {name} of {', '.join(known)}, got {', '.join(odd) or 'none'}")
        # a name that does not exist is refused here, before a folder is made for it
        parse_method(self.method)

    def layer_numbers(self, model: MaskedLM) -> list[int]:
        """The layers as numbers 0..L; raises `InputError` for others."""
        most = model.config.layers
        numbers = [layer + most + 1 if layer < 0 else layer for layer in self.layers]
        odd = [given for given, number in zip(self.layers, numbers, strict=True) if not 0 <= number <= most]
        if odd:
            raise InputError(f"expected layers in 0..{most} or -{most + 1}..-1, got {odd}")
        return sorted(set(numbers))


@dataclass(frozen=True)
class Step:
    """Progress: residues done of all; `masked` while single residues are being hidden."""

    done: int
    total: int
    masked: bool


def array_specs(model: MaskedLM, options: EmbedOptions) -> list[ArraySpec]:
    """The arrays that a job makes, in order."""
    width, kind = (model.config.width,), options.array_dtype
    specs: list[ArraySpec] = []
    for name, axis in (("mean", "protein"), ("bos", "protein"), ("per-tok", "residue")):
        if name in options.include:
            key = name.replace("-", "_")
            specs += [ArraySpec(f"{key}/{layer}", axis, width, kind) for layer in options.layer_numbers(model)]
    if "logits" in options.include:
        specs.append(ArraySpec("logits", "residue", (model.config.vocabulary,), kind))
    if "surprise" in options.include:
        specs += [ArraySpec(name, "residue", (), "int32" if name == "rank" else "float32") for name in SURPRISE]
    return specs


def outputs(model: MaskedLM, options: EmbedOptions) -> Outputs:
    """What a batch holds, for the prediction of memory."""
    values = sum(int(np.prod(spec.row)) for spec in array_specs(model, options) if spec.axis == "residue")
    return Outputs(values, len(options.layer_numbers(model)))


def refuse_too_large(model: MaskedLM, lengths: Sequence[int], options: EmbedOptions, budget: int, limit: int) -> None:
    """Raise `InputError` where a batch of `budget` tokens would take more than `limit` bytes."""
    largest = max((sum(lengths[a:b]) + 2 * (b - a) for a, b in make_batches(lengths, budget)), default=0)
    need = batch_bytes(model.config, largest, model.dtype.itemsize, outputs(model, options))
    if need > limit:
        raise InputError(
            f"batches of up to {largest:,} tokens need about {need / 2**30:.1f} GiB and {limit / 2**30:.1f} GiB are "
            f"allowed; raise --max-memory, or lower --tokens-per-batch (now {budget:,}, kept by a folder begun with it)"
        )


def refuse_too_long(model: MaskedLM, survey: Survey, options: EmbedOptions, limit: int) -> None:
    """Raise `InputError` where a protein cannot fit, before any work starts; says which, and what would help."""
    most = model.config.max_length
    held = outputs(model, options)
    element = model.dtype.itemsize
    for entry in sorted(survey.entries, key=lambda entry: -entry.length):
        name = f"{entry.source}, record {entry.number} ({entry.id}), {entry.length} residues"
        if most is not None and entry.length + 2 > most:
            raise InputError(f"{name}: expected at most {most - 2} residues for this model; use one without that limit")
        need = batch_bytes(model.config, entry.length + 2, element, held)
        if need > limit:
            raise InputError(
                f"{name}: needs about {need / 2**30:.1f} GiB and {limit / 2**30:.1f} GiB are allowed; raise "
                "--max-memory, use --dtype bfloat16, include less, or a smaller model"
            )
        break


def identity(model: MaskedLM, survey: Survey, options: EmbedOptions) -> dict[str, Any]:
    """Everything that decides the results, as plain JSON: what is meant, not how it was spelt."""
    chosen = asdict(options) | {"include": sorted(options.include), "layers": options.layer_numbers(model)}
    return job_identity(model, survey, chosen | {"method": str(parse_method(options.method))})


def embed(
    model: MaskedLM,
    paths: Sequence[Path | str],
    survey: Survey,
    options: EmbedOptions,
    folder: ResultFolder,
    report: Callable[[Step], None],
) -> Path:
    """Do what is left of the job, write the final files, and return the table's path.

    A unit of work is a batch of proteins, or, for masked surprise, a stretch of residues; each counts once it is on
    the disk.
    """
    if folder.complete:
        return folder.path / "index.parquet"
    attend = attend_with(options.method)
    lengths = [entry.length for entry in survey.entries]
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    budget, done = int(folder.settled["tokens_per_batch"]), folder.done()
    skip = bool(survey.skipped)
    batches = list(make_batches(lengths, budget))
    masked = "surprise" in options.include and options.surprise == "masked"
    stretches = list(_stretches(lengths, budget)) if masked else []
    sequences = read_cleaned(paths, skip_errors=skip)
    with torch.inference_mode():
        at = 0
        for unit, (first, last) in enumerate(batches):
            if unit < done:
                continue
            texts = list(islice(sequences, first - at, last - at))[-(last - first) :]
            refuse_changed(texts, survey.entries[first:last])
            at = last
            for name, start, rows in _batch_arrays(model, texts, first, int(starts[first]), options, attend):
                folder.arrays[name].write(start, rows)
            folder.commit(unit)
            report(Step(int(starts[last]), int(starts[-1]), masked=False))
    if masked:
        sequences = read_cleaned(paths, skip_errors=skip)
        with torch.inference_mode():
            _masked_units(
                model, sequences, survey.entries, starts, stretches, len(batches), done, folder, attend, report
            )
    return _finalise(survey, options, folder, starts)


def _masked_units(
    model: MaskedLM,
    sequences: Iterator[str],
    entries: Sequence[Entry],
    starts: NDArray[np.int64],
    stretches: list[tuple[int, int]],
    before: int,
    done: int,
    folder: ResultFolder,
    attend: Attend,
    report: Callable[[Step], None],
) -> None:
    """Surprise with each residue hidden, a stretch of residues at a time."""
    held: dict[int, NDArray[np.int64]] = {}
    read = 0
    for number, (a, b) in enumerate(stretches):
        if before + number < done:
            continue
        first, last = (int(np.searchsorted(starts, place, "right")) - 1 for place in (a, b - 1))
        held = {place: tokens for place, tokens in held.items() if place >= first}
        while read <= last:
            text = next(sequences, "")
            refuse_changed([text], [entries[read]])
            if read >= first:
                held[read] = model.alphabet.encode(text)
            read += 1
        owners = np.searchsorted(starts, np.arange(a, b), "right") - 1
        numbers = list(range(first, last + 1))
        places = [Place(int(o) - first, int(r - starts[o])) for r, o in zip(range(a, b), owners, strict=True)]
        tokens = [held[place] for place in numbers]
        for name, rows in _surprise_arrays(masked_predictions(model, tokens, places, attend)):
            folder.arrays[name].write(a, rows)
        folder.commit(before + number)
        report(Step(b, int(starts[-1]), masked=True))


def _stretches(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of residues, all proteins end to end, whose masked copies hold at most `budget` tokens (or one copy)."""
    start = place = tokens = 0
    for length in lengths:
        for _ in range(length):
            if place > start and tokens + length + 2 > budget:
                yield start, place
                start, tokens = place, 0
            tokens += length + 2
            place += 1
    if place > start:
        yield start, place


def _batch_arrays(
    model: MaskedLM, texts: list[str], protein: int, residue: int, options: EmbedOptions, attend: Attend
) -> Iterator[tuple[str, int, NDArray[Any]]]:
    """(name, first row, rows) of each array for a batch of proteins."""
    packed = model.pack(texts)
    layers = options.layer_numbers(model)
    encoded = model(packed, attend=attend, keep=layers)
    rows = residue_rows(packed)
    counts = torch.tensor([len(text) for text in texts], device=rows.device)
    for layer in layers:
        hidden = encoded.layers[layer]
        if "mean" in options.include:
            # one protein at a time: a long one's running sum in float32 would lose digits
            parts = hidden[rows].float().split(counts.tolist())
            yield f"mean/{layer}", protein, _numpy(torch.stack([part.mean(0) for part in parts]))
        if "bos" in options.include:
            yield f"bos/{layer}", protein, _numpy(hidden[packed.cu_seqlens[:-1].long()])
        if "per-tok" in options.include:
            yield f"per_tok/{layer}", residue, _numpy(hidden[rows])
    if "logits" in options.include:
        yield "logits", residue, _numpy(model.logits(encoded.last[rows]))
    if "surprise" in options.include and options.surprise == "wt":
        for name, values in _surprise_arrays(residue_predictions(model, packed, encoded, rows)):
            yield name, residue, values


def _surprise_arrays(found: Predictions) -> Iterator[tuple[str, NDArray[Any]]]:
    for name in SURPRISE:
        yield name, getattr(found, name).cpu().numpy().astype(np.int32 if name == "rank" else np.float32)


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()


def _finalise(survey: Survey, options: EmbedOptions, folder: ResultFolder, starts: NDArray[np.int64]) -> Path:
    """The final files, made beside the raw ones and moved into place whole."""
    specs = folder.specs
    rows = {"protein": len(survey.entries), "residue": int(starts[-1])}
    arrays = {spec.name: folder.arrays[spec.name].read(rows[spec.axis]) for spec in specs}
    made = folder.work / "final"
    made.mkdir(exist_ok=True)
    ids = [entry.id for entry in survey.entries]
    written = write_arrays(Finished(specs, arrays, starts, ids), options.format, made)
    write_table(made / "index.parquet", survey, starts, arrays, written.name)
    for path in (written, made / "index.parquet"):
        target = folder.path / path.name
        if target.is_dir():
            # left from a run that was killed between here and the end
            shutil.rmtree(target)
        sync_tree(path)
        path.replace(target)
    folder.finish([folder.path / written.name, folder.path / "index.parquet"])
    return folder.path / "index.parquet"
