"""Proteins to contact maps: `longlens contacts`."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from longlens.errors import InputError
from longlens.io.pairs import PairSpool
from longlens.io.results import ResultFolder, sync_tree
from longlens.io.survey import Entry, Survey, read_cleaned
from longlens.io.table import survey_columns, write_columns
from longlens.jobs.job_key import job_identity, refuse_changed
from longlens.jobs.plan import Outputs, batch_bytes
from longlens.lens.contacts import (
    ContactMap,
    ContactObserver,
    KeptMap,
    Regression,
    Rows,
    WholeMap,
    kept_bytes,
    whole_bytes,
)
from longlens.models.language_model import MaskedLM

FORMATS = ("parquet", "npz", "zarr")
# small proteins are predicted together, up to this many tokens and bytes of maps
TOKENS = 4096
MAPS = 2**27
# sides of a figure's map, and of a stored chunk
CELLS = 1000
CHUNK = 256


@dataclass(frozen=True)
class ContactOptions:
    """What to keep of a map: pairs above `threshold`, the `top` partners of each residue, or a `band` |i - j| <= band
    (one of them), from `separation` on; or, with the format zarr, all of it in `array_dtype`."""

    format: str = "parquet"
    threshold: float | None = None
    top: int | None = None
    band: int | None = None
    separation: int = 6
    array_dtype: str = "float16"
    figure: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("threshold", "top", "band") if getattr(self, name) is not None]
        if self.format not in FORMATS or self.array_dtype not in ("float16", "float32"):
            raise InputError(f"expected a format of {', '.join(FORMATS)} and float16 or float32, got {self}")
        if self.format == "zarr" and given:
            raise InputError(f"expected format parquet or npz with {given[0]}: zarr holds the whole map")
        if self.format != "zarr" and len(given) != 1:
            raise InputError(f"expected one of threshold, top and band, got {', '.join(given) or 'none'}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"expected a threshold in 0..1, got {self.threshold}")
        for name, least in (("top", 1), ("band", 0), ("separation", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"expected {name} of at least {least}, got {value}")
        if self.band is not None and self.band < self.separation:
            raise InputError(
                f"expected a band of at least the separation, {self.separation}, got {self.band}: nothing would be left"
            )


# ---- what is kept of a map's rows


class Sink(ABC):
    """Takes the stretches of rows of one map's upper triangle, in order."""

    @abstractmethod
    def take(self, rows: Rows) -> None:
        """Take in a stretch."""


class Selected(Sink):
    """Pairs i < j that are far enough apart and above a threshold or within a band, by i and then j."""

    def __init__(self, options: ContactOptions, spool: PairSpool) -> None:
        self.options, self.spool = options, spool

    def take(self, rows: Rows) -> None:
        found, options = rows.probabilities, self.options
        if options.band is not None:
            found = found[:, : len(found) + options.band]
        gap = _gaps(found)
        keep = gap >= max(1, options.separation)
        keep &= found >= options.threshold if options.threshold is not None else gap <= (options.band or 0)
        i, j = keep.nonzero(as_tuple=True)
        values = found[i, j]
        self.spool.append(*(part.cpu().numpy() for part in (i + rows.first, j + rows.first, values)))


class Best(Sink):
    """The `top` strongest partners of each residue, on either side."""

    def __init__(self, options: ContactOptions, residues: int) -> None:
        assert options.top is not None
        self.separation = max(1, options.separation)
        self.values = torch.full((residues, options.top), -1.0)
        self.partners = torch.full((residues, options.top), -1, dtype=torch.int64)

    def take(self, rows: Rows) -> None:
        found = rows.probabilities.masked_fill(_gaps(rows.probabilities) < self.separation, -1.0).cpu()
        self._merge(slice(rows.first, rows.first + len(found)), found, rows.first)
        self._merge(slice(rows.first, rows.first + found.shape[1]), found.T, rows.first)

    def _merge(self, owners: slice, found: Tensor, first: int) -> None:
        """`found` (owners, m): partners first..first + m."""
        best, place = torch.topk(found, min(self.values.shape[1], found.shape[1]))
        values = torch.cat([self.values[owners], best], 1)
        partners = torch.cat([self.partners[owners], place + first], 1)
        self.values[owners], order = torch.topk(values, self.values.shape[1])
        self.partners[owners] = partners.gather(1, order)

    def finish(self, spool: PairSpool) -> None:
        """Each residue's partners, the strongest first."""
        i, rank = (self.values >= 0).nonzero(as_tuple=True)
        spool.append(i.numpy(), self.partners[i, rank].numpy(), self.values[i, rank].numpy())


class Dense(Sink):
    """The whole map as a Zarr array."""

    def __init__(self, path: Path, residues: int, dtype: str) -> None:
        import zarr

        chunk = min(CHUNK, residues)
        self.array: Any = zarr.create_array(path, shape=(residues, residues), dtype=dtype, chunks=(chunk, chunk))

    def take(self, rows: Rows) -> None:
        values = rows.probabilities.cpu().numpy().astype(self.array.dtype)
        last = rows.first + len(values)
        self.array[rows.first : last, rows.first :] = values
        self.array[last:, rows.first : last] = values[:, len(values) :].T


class Picture(Sink):
    """The map in at most `CELLS` x `CELLS` cells, each the largest of its pairs."""

    def __init__(self, residues: int) -> None:
        self.width = -(-residues // CELLS)
        count = -(-residues // self.width)
        self.cells = torch.zeros(count, count)

    def take(self, rows: Rows) -> None:
        found = rows.probabilities.cpu()
        columns = torch.arange(rows.first, rows.first + found.shape[1]) // self.width
        owners = torch.arange(rows.first, rows.first + len(found)) // self.width
        by_column = torch.zeros(len(found), len(self.cells))
        by_column.scatter_reduce_(1, columns.expand_as(found), found, "amax")
        self.cells.scatter_reduce_(0, owners.unsqueeze(1).expand_as(by_column), by_column, "amax")

    def finish(self) -> Tensor:
        """Both halves."""
        return torch.maximum(self.cells, self.cells.T)


def _gaps(found: Tensor) -> Tensor:
    """j - i of a stretch of the upper triangle."""
    m, n = found.shape
    return torch.arange(n, device=found.device) - torch.arange(m, device=found.device).unsqueeze(1)


# ---- the job


def identity(model: MaskedLM, survey: Survey, options: ContactOptions) -> dict[str, Any]:
    """Everything that decides the results, as plain JSON."""
    return job_identity(model, survey, asdict(options))


def needs(model: MaskedLM, residues: int) -> dict[str, int]:
    """Predicted peak growth of memory, in bytes, of each form of one protein's map."""
    config, element = model.config, model.dtype.itemsize
    passing = batch_bytes(config, residues + 2, element, Outputs(0, 0))
    head = (config.layers, config.heads)
    # what stays after the pass, and the stretch of rows at hand
    return {
        "whole": passing + whole_bytes(*head, residues),
        "kept": passing + kept_bytes(*head, config.head_width, element, residues),
    }


def choose_form(model: MaskedLM, residues: int, limit: int) -> str:
    """ "whole" where it fits in `limit` bytes, else "kept"; raises `InputError` where neither does."""
    found = needs(model, residues)
    for form, need in found.items():
        if need <= limit:
            return form
    raise InputError(
        f"a protein of {residues} residues needs about {found['kept'] / 2**30:.1f} GiB and {limit / 2**30:.1f} GiB are "
        "allowed; raise --max-memory, use --dtype bfloat16 or a smaller model"
    )


def refuse_too_long(model: MaskedLM, survey: Survey, limit: int) -> None:
    """Raise `InputError` where a protein cannot fit, before any work starts."""
    entry = max(survey.entries, key=lambda entry: entry.length)
    most = model.config.max_length
    if most is not None and entry.length + 2 > most:
        raise InputError(
            f"{entry.source}, record {entry.number} ({entry.id}): expected at most {most - 2} residues for this model, "
            f"got {entry.length}"
        )
    choose_form(model, entry.length, limit)


def make_units(entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    """Ranges of proteins that are predicted together."""
    start = tokens = held = 0
    for place, entry in enumerate(entries):
        size = 4 * entry.length**2
        if place > start and (tokens + entry.length + 2 > TOKENS or held + size > MAPS):
            yield start, place
            start = place
            tokens = held = 0
        tokens += entry.length + 2
        held += size
    yield start, len(entries)


def contacts(
    model: MaskedLM,
    paths: Sequence[Path | str],
    survey: Survey,
    options: ContactOptions,
    folder: ResultFolder,
    draw: Callable[[Tensor, Entry, Path], None] | None,
    report: Callable[[int], None],
) -> Path:
    """Do what is left of the job and return the table's path. `draw` makes a figure of a map's cells.

    A unit of work is a few small proteins or a long one; it counts once its files are on the disk.
    """
    table = folder.path / "index.parquet"
    if folder.complete:
        return table
    regression, limit, done = model.contact_regression(), int(folder.settled["memory"]), folder.done()
    sequences, at = read_cleaned(paths, skip_errors=bool(survey.skipped)), 0
    finished = 0
    with torch.inference_mode():
        for unit, (first, last) in enumerate(make_units(survey.entries)):
            entries = survey.entries[first:last]
            finished += sum(entry.length for entry in entries)
            if unit < done:
                continue
            texts = list(islice(sequences, first - at, last - at))
            at = last
            refuse_changed(texts, entries)
            for place, (entry, contact_map) in enumerate(_maps(model, texts, entries, regression, limit), first):
                _write_map(contact_map, entry, place, options, folder, draw)
            folder.commit(unit)
            report(finished)
    return _finalise(model, survey, options, folder, limit)


def _maps(
    model: MaskedLM, texts: list[str], entries: Sequence[Entry], regression: Regression, limit: int
) -> Iterator[tuple[Entry, ContactMap]]:
    packed = model.pack(texts)
    maps: list[ContactMap] = []
    for start, stop in pairwise(packed.cu_seqlens.tolist()):
        residues = stop - start - 2
        whole = choose_form(model, residues, limit) == "whole"
        maps.append(WholeMap(residues, regression, model.device) if whole else KeptMap(residues, regression))
    model(packed, observers=[ContactObserver(maps)])
    yield from zip(entries, maps, strict=True)


def file_name(place: int, options: ContactOptions) -> str:
    """Of the protein with number `place` (from 0)."""
    return f"{place + 1:07d}.{options.format}"


def _write_map(
    contact_map: ContactMap,
    entry: Entry,
    place: int,
    options: ContactOptions,
    folder: ResultFolder,
    draw: Callable[[Tensor, Entry, Path], None] | None,
) -> None:
    target = folder.path / file_name(place, options)
    picture = Picture(entry.length) if draw is not None else None
    sinks: list[Sink] = [] if picture is None else [picture]
    half = folder.work / target.name
    with PairSpool(folder.work) as spool:
        best = None
        if options.format == "zarr":
            shutil.rmtree(half, ignore_errors=True)
            sinks.append(Dense(half, entry.length, options.array_dtype))
        elif options.top is not None:
            best = Best(options, entry.length)
            sinks.append(best)
        else:
            sinks.append(Selected(options, spool))
        for rows in contact_map.rows():
            for sink in sinks:
                sink.take(rows)
        if best is not None:
            best.finish(spool)
        if options.format == "zarr":
            sync_tree(half)
            # a unit that was killed before it counted may have left one
            shutil.rmtree(target, ignore_errors=True)
            half.replace(target)
        else:
            spool.write(target, entry.length)
    if draw is not None and picture is not None:
        draw(picture.finish(), entry, target.with_suffix(".png"))


def _finalise(model: MaskedLM, survey: Survey, options: ContactOptions, folder: ResultFolder, limit: int) -> Path:
    entries = survey.entries
    names = [file_name(place, options) for place in range(len(entries))]
    columns = survey_columns(survey) | {
        "file": list(names),
        "pairs": [_pairs_in(folder.path / name, entry.length) for name, entry in zip(names, entries, strict=True)],
        "form": [choose_form(model, entry.length, limit) for entry in entries],
    }
    table = folder.path / "index.parquet"
    half = folder.work / "index.parquet"
    write_columns(half, survey, columns)
    sync_tree(half)
    half.replace(table)
    folder.finish([table, *(folder.path / name for name in names)])
    return table


def _pairs_in(path: Path, residues: int) -> int:
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    if path.suffix == ".npz":
        with np.load(path) as file:
            return len(file["data"])
    return residues * residues
