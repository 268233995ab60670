"""The job that predicts contact maps of proteins: `longlens.contacts` and `longlens contacts`."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor

from longlens.io.contact_rr import count_rr
from longlens.io.pairs import PairSpool
from longlens.io.results import ResultFolder
from longlens.io.survey import RecordInfo
from longlens.io.table import survey_columns, write_columns
from longlens.jobs.contact_maps import ContactMaps
from longlens.jobs.contact_writers import (
    ContactOptions,
    MapPreview,
    MapWriter,
    PairWriter,
    TopPartnersWriter,
    WholeMapWriter,
)
from longlens.jobs.fit_contacts import load_head
from longlens.jobs.inputs import Proteins, ProteinSource, open_proteins
from longlens.jobs.job_key import ModelInfo, job_key
from longlens.jobs.limits import load_model, memory_limit, threads_set
from longlens.jobs.output import output_folder
from longlens.jobs.plan import BatchOutputs, batch_bytes
from longlens.jobs.progress import ProgressCallback, only_warnings
from longlens.jobs.runner import Job, Unit, UnitMemory, announce, described, file_notes, residue_units, run
from longlens.lens.contacts import ContactMap, ContactObserver, KeptMap, WholeMap, kept_bytes, whole_bytes
from longlens.models.encoder import attend_with
from longlens.models.language_model import MaskedLM
from longlens.report.contacts import draw_contacts
from longlens.report.figures import require_matplotlib

# small proteins are predicted together, up to this many tokens and bytes of maps
TOKENS = 4096
MAPS = 2**27


def needs(model: MaskedLM, residues: int) -> dict[str, int]:
    """Predicted peak growth of memory, in bytes, of each form of one protein's map."""
    config, element = model.config, model.dtype.itemsize
    passing = batch_bytes(config, residues + 2, element, BatchOutputs(0, 0))
    head = (config.layers, config.heads)
    # the memory that stays after the pass, and the current rows
    return {
        "whole": passing + whole_bytes(*head, residues),
        "kept": passing + kept_bytes(*head, config.head_width, element, residues),
    }


def choose_form(model: MaskedLM, residues: int, limit: int) -> str:
    """ "whole" if a protein's map fits in `limit` bytes, else "kept", which is linear in its length."""
    return "whole" if needs(model, residues)["whole"] <= limit else "kept"


def make_units(entries: Sequence[RecordInfo]) -> Iterator[tuple[int, int]]:
    """Ranges of proteins that are predicted together."""
    start = tokens = map_bytes = 0
    for place, entry in enumerate(entries):
        size = 4 * entry.length**2
        if place > start and (tokens + entry.length + 2 > TOKENS or map_bytes + size > MAPS):
            yield start, place
            start = place
            tokens = map_bytes = 0
        tokens += entry.length + 2
        map_bytes += size
    yield start, len(entries)


@dataclass
class ContactJob(Job):
    """A unit of work is a few small proteins or a long one. `limit`: bytes that it may take.

    `draw` makes a figure of a map's cells.
    """

    model: ModelInfo
    source: ProteinSource
    options: ContactOptions
    limit: int
    draw: Callable[[Tensor, RecordInfo, Path], None] | None = None

    @property
    def key(self) -> dict[str, Any]:
        return job_key(self.model, self.source.survey, asdict(self.options))

    @property
    def first_run_choices(self) -> dict[str, Any]:
        return {"memory": self.limit, "model": self.model.name}

    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        model, limit = self.model.language_model, int(first_run_choices["memory"])
        # the memory of the run that began decided the form of each map
        needed = {
            length: needs(model, length)[choose_form(model, length, limit)]
            for length in {entry.length for entry in self.source.survey.entries}
        }
        largest = max(self.source.survey.entries, key=lambda entry: needed[entry.length])
        smaller = "use --dtype bfloat16 or a smaller model"
        return UnitMemory(needed[largest.length], described(largest), smaller, chosen=True)

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        entries = self.source.survey.entries
        return residue_units("contacts", [entry.length for entry in entries], list(make_units(entries)))

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Any]:
        limit = int(folder.first_run_choices["memory"])
        entries = self.source.survey.entries[unit.first : unit.last]
        for place, (entry, contact_map) in enumerate(zip(entries, self._maps(texts, limit), strict=True), unit.first):
            _write_map(contact_map, entry, place, self.options, folder, file_notes(self.model, folder), self.draw)
        return ()

    def _maps(self, texts: list[str], limit: int) -> list[ContactMap]:
        model = self.model.language_model
        regression = model.contact_regression()
        packed = model.pack(texts)
        maps: list[ContactMap] = []
        for start, stop in pairwise(packed.cu_seqlens.tolist()):
            residues = stop - start - model.alphabet.around
            whole = choose_form(model, residues, limit) == "whole"
            maps.append(WholeMap(residues, regression, model.device) if whole else KeptMap(residues, regression))
        model(packed, attend=attend_with("exact"), observers=[ContactObserver(maps, before=model.alphabet.before)])
        return maps

    def finish(self, folder: ResultFolder) -> list[Path]:
        entries, limit = self.source.survey.entries, int(folder.first_run_choices["memory"])
        names = [file_name(place, self.options) for place in range(len(entries))]
        pairs = [_pairs_in(folder.path / name, entry.length) for name, entry in zip(names, entries, strict=True)]
        columns = survey_columns(self.source.survey) | {
            "file": list(names), "pairs": pairs,
            "form": [choose_form(self.model.language_model, entry.length, limit) for entry in entries],
        }  # fmt: skip
        table_path = folder.work / "index.parquet"
        write_columns(table_path, self.source.survey, columns, file_notes(self.model, folder))
        files = [folder.path / name for name in names]
        figures = [path.with_suffix(".png") for path in files] if self.options.figure else []
        return [folder.place(table_path), *files, *figures]


def file_name(place: int, options: ContactOptions) -> str:
    """The file name of the protein with number `place` (from 0)."""
    return f"{place + 1:07d}.{options.format}"


def _write_map(
    contact_map: ContactMap,
    entry: RecordInfo,
    place: int,
    options: ContactOptions,
    folder: ResultFolder,
    about: dict[str, str],
    draw: Callable[[Tensor, RecordInfo, Path], None] | None,
) -> None:
    about = about | {"id": entry.id, "length": str(entry.length)}
    target = folder.path / file_name(place, options)
    picture = MapPreview(entry.length, options.separation) if draw is not None else None
    sinks: list[MapWriter] = [] if picture is None else [picture]
    half = folder.work / target.name
    with PairSpool(folder.work) as spool:
        best = None
        if options.format == "zarr":
            shutil.rmtree(half, ignore_errors=True)
            sinks.append(WholeMapWriter(half, entry.length, options.array_dtype, about))
        elif options.top is not None:
            best = TopPartnersWriter(options, entry.length)
            sinks.append(best)
        else:
            sinks.append(PairWriter(options, spool))
        for rows in contact_map.rows():
            for sink in sinks:
                sink.take(rows)
        if best is not None:
            best.finish(spool)
        if options.format == "zarr":
            folder.place(half)
        else:
            spool.write(target, entry.length, about)
    if draw is not None and picture is not None:
        drawn = half.with_suffix(".png")
        draw(picture.finish(), entry, drawn)
        folder.place(drawn)


def _pairs_in(path: Path, residues: int) -> int:
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    if path.suffix == ".npz":
        with np.load(path) as file:
            return len(file["data"])
    if path.suffix == ".rr":
        return count_rr(path)
    return residues * residues


def contacts(
    proteins: Proteins,
    *,
    model: str | Path | MaskedLM = "tiny",
    output: str | Path | None = None,
    format: str = "parquet",
    threshold: float | None = None,
    top: int | None = None,
    band: int | None = None,
    min_separation: int = 6,
    array_dtype: str = "float16",
    head: str | Path | None = None,
    figure: bool = False,
    max_memory: str | None = None,
    on_error: str = "stop",
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback = only_warnings,
) -> ContactMaps:
    """Contact probabilities of proteins by ESM-2's contact head, in memory linear in their length where it must be.

    maps = longlens.contacts("proteins.fasta", model="facebook/esm2_t12_35M_UR50D", top=10)
    maps["P12345"]                              # i, j (from 1), probability

    Args:
        proteins: FASTA files, sequences, or a mapping of ids to sequences; one string is one file or one protein.
        model: a model, or what `longlens.load` takes; it needs a contact head.
        output: a folder; an interrupted job in it continues. None: a temporary folder, which the result owns.
        format: "parquet", "npz" or "rr" (CASP's) for chosen pairs, "zarr" for whole maps.
        threshold, top, band: one of the three: keep pairs of at least this probability (the default, 0.3), each
            residue's strongest partners, or pairs at most this far apart.
        min_separation: leave out pairs that are closer than this.
        array_dtype: of whole maps, "float16" or "float32".
        head: a contact head made by `longlens contacts fit`.
        figure: also draw each map.
        max_memory: limit of the whole process, such as "16G"; None is 80 % of free memory.
        on_error: "stop", or "skip": records that cannot be read are listed in the table.
        dtype, device: as `longlens.load` takes them.
        threads: number of PyTorch's threads; None does not change it.
        progress: is called with each event of the job; the default passes warnings on as `LonglensWarning`.

    Raises:
        InputError: options that do not exist, a model without a contact head, proteins that do not fit.
    """
    if threshold is None and top is None and band is None and format != "zarr":
        threshold = 0.3
    options = ContactOptions(
        format=format, threshold=threshold, top=top, band=band, separation=min_separation, array_dtype=array_dtype,
        figure=figure,
    )  # fmt: skip
    with threads_set(threads), open_proteins(proteins, on_error=on_error) as source:
        loaded = load_model(model, dtype, device, max_memory)
        if head is not None:
            if loaded is model:
                # the caller's model keeps its own head
                loaded = copy.copy(loaded)
                loaded._modules = dict(loaded._modules)
            load_head(loaded, Path(head))
        # raises its error before a folder is made
        loaded.contact_regression()
        info = ModelInfo(loaded, loaded.source)
        draw = _drawing(info.name) if figure else None
        announce(info, source.survey, progress)
        limit = memory_limit(loaded, max_memory)
        with output_folder(output) as folder:
            run(ContactJob(info, source, options, limit, draw), folder.path, progress)
    return ContactMaps(folder)


def _drawing(name: str) -> Callable[[Tensor, RecordInfo, Path], None]:
    """The function that draws a map's cells. Raises `InputError` if matplotlib is missing, before any work."""
    require_matplotlib()

    def draw(cells: Tensor, entry: RecordInfo, path: Path) -> None:
        draw_contacts(cells, entry.length, f"{entry.id}, {entry.length:,} residues", name).savefig(path, dpi=150)

    return draw
