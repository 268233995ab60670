"""The job that makes tables and figures of what a model attends to: `longlens.look` and `longlens look`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from longlens.errors import InputError
from longlens.hf.texts import TextModel, TokenizedText, load_text_model
from longlens.io.results import ResultFolder
from longlens.jobs.inputs import (
    Proteins,
    ProteinSource,
    SelectedRecords,
    as_words,
    open_proteins,
)
from longlens.jobs.job_key import ModelInfo, job_key
from longlens.jobs.limits import chains_of, load_model, memory_limit, threads_set
from longlens.jobs.look import (
    LookOptions,
    folder_name,
    look_at_protein,
    look_at_text,
    protein_bytes,
    protein_options,
    refuse_tokens,
    text_bytes,
    text_options,
)
from longlens.jobs.looks import Looks
from longlens.jobs.output import output_folder
from longlens.jobs.profiles import write_profile
from longlens.jobs.progress import ProgressCallback, StageProgress, only_warnings
from longlens.jobs.runner import Job, Unit, UnitMemory, announce, described, file_notes, run
from longlens.jobs.texts import TextSource, opened_source, refuse_protein_model
from longlens.lens.profile import Profile
from longlens.models.language_model import MaskedLM
from longlens.ops.method import Method
from longlens.ops.registry import parse_method


@dataclass
class LookJob(Job):
    """A unit of work is one sequence: its folder is written aside and moved into place whole.

    `profile` computes the profile of a sequence; the second argument is the title. `need`: bytes that the longest
    sequence takes, of `limit`.
    """

    grad_mode: ClassVar[type[torch.inference_mode | torch.no_grad]] = torch.no_grad

    model: ModelInfo
    source: ProteinSource
    options: LookOptions
    profile: Callable[[str, str], Profile]
    limit: int
    need: int

    @property
    def key(self) -> dict[str, Any]:
        # figures name the model, so its name belongs to the job key
        chosen = asdict(self.options) | {"method": str(parse_method(self.options.method)), "name": self.model.name}
        survey = self.source.survey
        records = [[entry.source, entry.number, entry.sha256] for entry in survey.entries]
        skipped = [[record.source, record.number] for record in survey.skipped]
        return job_key(self.model, survey, chosen | {"records": records, "skipped": skipped})

    @property
    def about(self) -> dict[str, Any]:
        skipped = [
            {"id": record.id, "source": record.source, "number": record.number, "problem": record.reason}
            for record in self.source.survey.skipped
        ]
        return super().about | {"folders": self._names, "skipped": skipped}

    @property
    def _names(self) -> list[str]:
        entries = self.source.survey.entries
        width = len(str(max(entry.number for entry in entries)))
        return [folder_name(entry.id, entry.number, width) for entry in entries]

    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        smaller = "collect less, choose fewer layers or heads, use --dtype bfloat16 or a smaller model"
        unit = "residues" if isinstance(self.model.module, MaskedLM) else "tokens"
        return UnitMemory(self.need, described(self.source.survey.longest, unit), smaller)

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        total = len(self.source.survey.entries)
        return (Unit(place, place + 1, StageProgress("look", place + 1, total, "sequences")) for place in range(total))

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Any]:
        entry, options = self.source.survey.entries[unit.first], self.options
        folder_path = folder.work / self._names[unit.first]
        # left by a run that was killed
        shutil.rmtree(folder_path, ignore_errors=True)
        folder_path.mkdir(parents=True)
        profile = self.profile(texts[0], entry.id or f"record {entry.number}")
        about = file_notes(self.model, folder) | {"id": entry.id, "length": str(entry.length)}
        write_profile(profile, folder_path, options.tokens, options.maps, draw=options.figures, about=about)
        folder.place(folder_path)
        return ()

    def finish(self, folder: ResultFolder) -> list[Path]:
        return [folder.path / name for name in self._names]


def look(
    source: Proteins,
    *,
    model: str | Path | MaskedLM = "tiny",
    output: str | Path | None = None,
    layers: int | str | Sequence[int | str] | None = None,
    heads: Sequence[int] | None = None,
    collect: str | Sequence[str] | None = None,
    tokens: Sequence[int] = (),
    maps: Sequence[tuple[int, int]] = (),
    record: str | Sequence[str] = (),
    pool: int = 256,
    top: int = 8,
    input: str = "auto",
    figures: bool = True,
    max_memory: str | None = None,
    on_error: str = "stop",
    method: Method | str = "exact",
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback = only_warnings,
) -> Looks:
    """Tables and figures of what a model attends to in proteins or in one text.

    looks = longlens.look({"a": "MKTAYIAK"}, figures=False)
    looks["a"]["rows"]["entropy"]               # (layers x heads x tokens,)

    Args:
        source: proteins, as `longlens.embed` takes them, or a text: a file, or with `input` "text" the text itself.
        model: for proteins, what `longlens.load` takes; for a text, a transformers folder or a name on the hub.
        output: a folder; an interrupted job in it continues. None: a temporary folder, which the result owns.
        layers, heads: from 0; -1 is the last layer; None or "all": all.
        collect: names of the attention statistics, and "surprise"; None: a standard selection.
        tokens: tokens whose partners are shown; empty: those that receive most. A residue has its token's number.
        maps: (layer, head) of the maps that are shown; empty: the heads that stand out.
        record: ids of the records to use; empty: all.
        pool: the most cells along a map.
        top: partners kept for each token and head.
        input: "proteins", "text", or "auto": proteins, unless it is a file that does not look like FASTA.
        figures: also draw figures.
        max_memory: limit of the whole process, such as "16G"; None is 80 % of free memory.
        on_error: "stop", or "skip": records that cannot be read are left out, and listed in the manifest and the table.
        method: method of attention, an object or its string form.
        dtype, device: as `longlens.load` takes them.
        threads: number of PyTorch's threads; None does not change it.
        progress: is called with each event of the job; the default passes warnings on as `LonglensWarning`.

    Raises:
        InputError: options, layers or heads that do not exist, a text for a model of proteins, a sequence that does not
            fit.
    """
    options = LookOptions(
        layers=_layers(layers), heads=None if heads is None else tuple(heads),
        collect=None if collect is None else as_words(collect), tokens=tuple(tokens), maps=tuple(maps), pool=pool,
        links=top, method=str(method), figures=figures,
    )  # fmt: skip
    ids = (record,) if isinstance(record, str) else tuple(record)
    with threads_set(threads), opened_source(source, input) as (text, proteins):
        if text is not None:
            if ids:
                raise InputError("--record chooses among the records of a FASTA file; a text is one sequence")
            job = _text_job(*text, model, dtype, device, max_memory, options)
        else:
            with open_proteins(proteins, on_error=on_error, chains=chains_of(model)) as opened:
                chosen = SelectedRecords(opened, ids) if ids else opened
                job = _protein_job(chosen, model, dtype, device, max_memory, options)
        announce(job.model, job.source.survey, progress)
        with output_folder(output) as folder:
            run(job, folder.path, progress)
    return Looks(folder)


def _layers(layers: int | str | Sequence[int | str] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    words = as_words(layers)
    if "all" in words:
        return None
    numbers = tuple(word for word in words if isinstance(word, int))
    if len(numbers) < len(words):
        raise InputError(f"expected layers as whole numbers or 'all', got {layers!r}")
    return numbers


def _protein_job(
    source: ProteinSource, model: str | Path | MaskedLM, dtype: str, device: str, max_memory: str | None,
    options: LookOptions,
) -> LookJob:  # fmt: skip
    loaded = load_model(model, dtype, device, max_memory)
    info = ModelInfo(loaded, loaded.source)
    chosen = protein_options(loaded, options)
    for entry in source.survey.entries:
        refuse_tokens(chosen, entry.length + 2, described(entry))

    def profile(text: str, title: str) -> Profile:
        return look_at_protein(loaded, text, chosen, title=title, name=info.name)

    need = protein_bytes(loaded, source.survey.longest.length + 2, chosen)
    return LookJob(info, source, chosen, profile, memory_limit(loaded, max_memory), need)


def _text_job(
    text: str, name: str, model: str | Path | MaskedLM, dtype: str, device: str, max_memory: str | None,
    options: LookOptions,
) -> LookJob:  # fmt: skip
    if isinstance(model, MaskedLM) or str(model) in ("tiny", "antiberty"):
        raise InputError(
            f"{name}: expected --model to name a model of text (a transformers folder or hub name), got "
            f"{model.source if isinstance(model, MaskedLM) else model}, a model of proteins; a protein's file begins "
            "with a line such as >name"
        )
    loaded = load_text_model(str(model), dtype=dtype, device=device)
    refuse_protein_model(loaded, name)
    tokens = loaded.tokenize(text, name)
    chosen = text_options(loaded, options)
    refuse_tokens(chosen, len(tokens), name)
    info = ModelInfo(loaded.model, str(model))
    return LookJob(
        info, TextSource(text, name, len(tokens)), chosen, _text_profile(loaded, tokens, chosen, name, info),
        memory_limit(loaded.model, max_memory), text_bytes(loaded, len(tokens), chosen),
    )  # fmt: skip


def _text_profile(
    loaded: TextModel, tokens: TokenizedText, options: LookOptions, name: str, info: ModelInfo
) -> Callable[[str, str], Profile]:
    return lambda text, title: look_at_text(loaded, tokens, options, title=name, name=info.name)
