"""The job that computes vectors, logits and surprise of proteins: `longlens.embed` and `longlens embed`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.errors import InputError
from longlens.io.alphabet import CHAIN_BREAK, chain_breaks
from longlens.io.formats import FORMATS, require_zarr, write_arrays
from longlens.io.hdf5_formats import dataset_names
from longlens.io.result_arrays import ResultArrays
from longlens.io.results import ArraySpec, ResultFolder
from longlens.io.table import write_table
from longlens.jobs.embeddings import Embeddings
from longlens.jobs.inference import ResidueIndex, masked_predictions, residue_predictions, residue_rows
from longlens.jobs.inputs import Proteins, ProteinSource, SequenceReader, as_words, open_proteins
from longlens.jobs.job_key import ModelInfo, job_key
from longlens.jobs.limits import chains_of, load_model, memory_limit, threads_set
from longlens.jobs.model_inputs import Structures, prepare_model
from longlens.jobs.output import output_folder
from longlens.jobs.plan import BatchOutputs, batch_bytes, batch_tokens, largest_batch, make_batches
from longlens.jobs.progress import ProgressCallback, StageProgress, only_warnings
from longlens.jobs.runner import Job, Rows, Unit, UnitMemory, announce, described, file_notes, residue_units, run
from longlens.lens.predict.vocabulary import Predictions
from longlens.models.encoder import Attend, EncoderConfig, attend_with
from longlens.models.language_model import MaskedLM
from longlens.ops.method import Method
from longlens.ops.registry import parse_method

INCLUDES = ("mean", "per-tok", "bos", "logits", "surprise")
SURPRISE = ("surprise", "entropy", "excess", "rank")


@dataclass(frozen=True)
class EmbedOptions:
    """The options of an embedding. `layers` count from 0 (the embedding); -1 is the last, "all" means all of them.

    `surprise`: "wt" predicts each residue while the model sees it (one pass), "masked" masks it (one pass for each).
    """

    include: tuple[str, ...] = ("mean",)
    layers: tuple[int | str, ...] = (-1,)
    format: str = "h5"
    surprise: str = "wt"
    method: str = "exact"
    array_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, values, known in (
            ("include", self.include, INCLUDES),
            ("format", (self.format,), FORMATS),
            ("surprise", (self.surprise,), ("wt", "masked")),
            ("array dtype", (self.array_dtype,), ("float32", "float16")),
        ):
            unknown = [value for value in values if value not in known]
            if not values:
                raise InputError(f"expected {name} to name at least one of {', '.join(known)}")
            if unknown:
                raise InputError(f"expected {name} of {', '.join(known)}, got {', '.join(map(str, unknown))}")
        if self.surprise == "masked" and "surprise" not in self.include:
            raise InputError("surprise 'masked' has no effect unless surprise is computed: add surprise to --include")
        if self.format == "zarr":
            require_zarr()
        if self.format == "scikit-bio" and not set(self.include) <= {"mean", "per-tok", "bos"}:
            raise InputError(
                f"expected vectors for the format scikit-bio (mean, per-tok, bos), got {', '.join(self.include)}; "
                "choose another format for logits and surprise"
            )
        if self.format == "scikit-bio" and self.array_dtype != "float32":
            raise InputError(f"expected float32 for the format scikit-bio, got {self.array_dtype}, which it has not")
        # an unknown method raises its error here, before a folder is made
        parse_method(self.method)

    @property
    def predicts(self) -> bool:
        """Whether the options need a language model's head."""
        return not {"logits", "surprise"}.isdisjoint(self.include)

    def layer_numbers(self, config: EncoderConfig) -> list[int]:
        """The layers as numbers 0..L; raises `InputError` for others."""
        most = config.layers
        if "all" in self.layers:
            return list(range(most + 1))
        numbers = {layer: layer + most + 1 if layer < 0 else layer for layer in self.layers if isinstance(layer, int)}
        out_of_range = [layer for layer in self.layers if not isinstance(layer, int) or not 0 <= numbers[layer] <= most]
        if out_of_range or not numbers:
            raise InputError(f"expected layers in 0..{most} or -{most + 1}..-1, or all, got {out_of_range}")
        return sorted(set(numbers.values()))


def array_specs(config: EncoderConfig, options: EmbedOptions) -> list[ArraySpec]:
    """The arrays that a job makes, in order."""
    width, kind = (config.width,), options.array_dtype
    specs: list[ArraySpec] = []
    for name, axis in (("mean", "protein"), ("bos", "protein"), ("per-tok", "residue")):
        if name in options.include:
            key = name.replace("-", "_")
            specs += [ArraySpec(f"{key}/{layer}", axis, width, kind) for layer in options.layer_numbers(config)]
    if "logits" in options.include:
        specs.append(ArraySpec("logits", "residue", (config.vocabulary,), kind))
    if "surprise" in options.include:
        specs += [ArraySpec(name, "residue", (), "int32" if name == "rank" else "float32") for name in SURPRISE]
    return specs


def embedding_outputs(config: EncoderConfig, options: EmbedOptions) -> BatchOutputs:
    """The outputs of a batch that are kept until they are written, for the prediction of memory."""
    values = sum(int(np.prod(spec.row)) for spec in array_specs(config, options) if spec.axis == "residue")
    return BatchOutputs(values, len(options.layer_numbers(config)))


@dataclass
class EmbedJob(Job):
    """A unit of work is a batch of proteins, or, for masked surprise, a stretch of residues.

    `limit`: bytes that a batch may take; `budget`: tokens in a batch; `named`: whether the user chose that number.
    """

    model: ModelInfo
    source: ProteinSource
    options: EmbedOptions
    limit: int
    budget: int
    named: bool = False

    @cached_property
    def lengths(self) -> list[int]:
        """Residues of each protein."""
        return [entry.length for entry in self.source.survey.entries]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The first residue of each protein in the concatenation of all, and the end of the last protein."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @property
    def key(self) -> dict[str, Any]:
        chosen = asdict(self.options) | {
            "include": sorted(self.options.include),
            "layers": self.options.layer_numbers(self.model.language_model.config),
            "method": str(parse_method(self.options.method)),
        }
        key = job_key(self.model, self.source.survey, chosen)
        # a later run takes over the batch size that the first run chose, but a number that the user chose must stay
        return key | {"tokens_per_batch": self.budget} if self.named else key

    @property
    def specs(self) -> list[ArraySpec]:
        return array_specs(self.model.language_model.config, self.options)

    @property
    def first_run_choices(self) -> dict[str, Any]:
        return {"tokens_per_batch": self.budget, "model": self.model.name}

    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        budget = int(first_run_choices["tokens_per_batch"])
        model = self.model.language_model
        outputs = embedding_outputs(model.config, self.options)
        tokens = largest_batch(self.lengths, budget, masked=self.options.surprise == "masked")
        need = batch_bytes(model.config, tokens, model.dtype.itemsize, outputs)
        longest = self.source.survey.longest
        if tokens == longest.length + 2:
            unit, advice = described(longest), "use --dtype bfloat16, include less, or use a smaller model"
        else:
            unit, advice = f"a batch of {tokens:,} tokens, of {budget:,} as chosen", "or lower --tokens-per-batch"
        return UnitMemory(need, unit, advice, chosen=True)

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        budget = int(first_run_choices["tokens_per_batch"])
        yield from residue_units("embed", self.lengths, list(make_batches(self.lengths, budget)))
        if self.options.surprise != "masked":
            return
        for start, stop in _stretches(self.lengths, budget):
            first, last = (int(np.searchsorted(self.starts, place, "right")) - 1 for place in (start, stop - 1))
            yield Unit(first, last + 1, StageProgress("masked", stop, int(self.starts[-1])), start, stop)

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Rows]:
        model, attend = self.model.language_model, attend_with(self.options.method)
        if unit.step.stage == "masked":
            return self._masked(unit, texts, attend)
        return _batch_arrays(model, texts, unit.first, int(self.starts[unit.first]), self.options, attend)

    def _masked(self, unit: Unit, texts: list[str], attend: Attend) -> Iterator[Rows]:
        """Surprise of a range of residues, each masked in turn."""
        model = self.model.language_model
        tokens = [model.alphabet.encode(text) for text in texts]
        residues = np.arange(unit.start, unit.stop)
        owners = np.searchsorted(self.starts, residues, "right") - 1
        places = [
            ResidueIndex(int(owner) - unit.first, int(residue - self.starts[owner]))
            for residue, owner in zip(residues, owners, strict=True)
        ]
        breaks = chain_breaks("".join(texts))[unit.start - self.starts[unit.first] :][: len(residues)]
        for name, rows in _surprise_arrays(masked_predictions(model, tokens, places, attend), breaks):
            yield name, unit.start, rows

    def finish(self, folder: ResultFolder) -> list[Path]:
        """The final files, written beside the raw ones and moved into place whole."""
        survey, starts = self.source.survey, self.starts
        rows = {"protein": len(survey.entries), "residue": int(starts[-1])}
        arrays = {spec.name: folder.arrays[spec.name].read(rows[spec.axis]) for spec in folder.specs}
        final_folder = folder.work / "final"
        final_folder.mkdir(exist_ok=True)
        # the model's name when the job began, so that the bytes do not depend on where the model is when it continues
        about = file_notes(self.model, folder)
        ids = [entry.id for entry in survey.entries]
        results = ResultArrays(folder.specs, arrays, starts, ids, about, self._sequences)
        written = write_arrays(results, self.options.format, final_folder)
        # where it differs from the id, a reader needs the name of each protein's dataset
        more = {"dataset": dataset_names(ids)} if self.options.format == "h5-by-id" else {}
        write_table(final_folder / "index.parquet", survey, starts, arrays, written.name, about, more)
        return [folder.place(path) for path in (written, final_folder / "index.parquet")]

    def _sequences(self) -> Iterator[str]:
        """The proteins again; raises `SequenceError` if one has changed since the job began."""
        reader = SequenceReader(self.source)
        for place in range(len(self.lengths)):
            yield from reader.take(place, place + 1)


def embed(
    proteins: Proteins,
    *,
    model: str | Path | MaskedLM = "tiny",
    output: str | Path | None = None,
    include: str | Sequence[str] = ("mean",),
    layers: int | str | Sequence[int | str] = (-1,),
    surprise: str = "wt",
    format: str = "h5",
    array_dtype: str = "float32",
    method: Method | str = "exact",
    tokens_per_batch: int | str = "auto",
    max_memory: str | None = None,
    on_error: str = "stop",
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    structures: Structures | None = None,
    min_plddt: float | None = None,
    rare_as_x: bool = False,
    progress: ProgressCallback = only_warnings,
) -> Embeddings:
    """Vectors, logits and surprise of proteins, in memory linear in their length.

    embeddings = longlens.embed({"a": "MKTAYIAK", "b": "GAVLI"})
    embeddings["a"]                             # (d,), the mean over residues
    embeddings.array("mean/6")                  # (proteins, d)

    Args:
        proteins: FASTA files, sequences, or a mapping of ids to sequences; one string is one file or one protein. ESM-C
            takes complexes, with `|` between chains: it counts as a position, but not in means.
        model: a model, or what `longlens.load` takes.
        output: a folder; an interrupted job in it continues. None: a temporary folder, which the result owns.
        include: of "mean", "per-tok", "bos", "logits", "surprise".
        layers: from 0, the embedding, to the number of layers; -1 is the last; "all".
        surprise: "wt" predicts each residue in one pass that sees it; "masked" masks each residue in turn.
        format: format of the files: "h5", "zarr", "npz", or, for other programs, "h5-by-id", "scikit-bio", "pt" and
            "parquet".
        array_dtype: "float32" or "float16", the dtype of vectors and logits in the files.
        method: method of attention, an object or its string form.
        tokens_per_batch: a number, or "auto": as many as the memory allows.
        max_memory: limit of the whole process, such as "16G"; None is 80 % of free memory.
        on_error: "stop", or "skip": records that cannot be read are listed in the table.
        dtype, device: as `longlens.load` takes them.
        threads: number of PyTorch's threads; None does not change it.
        structures: for SaProt, the proteins' structures: PDB or mmCIF files, folders of them, FASTA files of structure
            letters by id, or letters by sequence. None: all are unknown.
        min_plddt: structure letters of residues with a lower pLDDT are unknown.
        rare_as_x: read U, Z, O and B as X, as ProtBert's authors do.
        progress: is called with each event of the job; the default passes warnings on as `LonglensWarning`.

    Raises:
        InputError: options that do not exist, proteins that cannot be read or do not fit, a folder of another job.
    """
    options = EmbedOptions(
        include=tuple(dict.fromkeys(as_words(include))), layers=tuple(as_words(layers)), format=format,
        surprise=surprise, method=str(method), array_dtype=array_dtype,
    )  # fmt: skip
    with threads_set(threads), open_proteins(proteins, on_error=on_error, chains=chains_of(model)) as source:
        loaded = load_model(model, dtype, device, max_memory)
        loaded = prepare_model(loaded, source, structures, min_plddt, rare_as_x=rare_as_x)
        if options.predicts:
            # raises its error before a folder is made
            loaded.require_head()
        if "bos" in options.include and not loaded.alphabet.before:
            raise InputError(f"expected a model with a start token for bos, got {loaded.source}; use mean")
        info = ModelInfo(loaded, loaded.source)
        announce(info, source.survey, progress)
        outputs = embedding_outputs(loaded.config, options)
        limit = memory_limit(loaded, max_memory)
        budget = batch_tokens(tokens_per_batch, loaded.config, loaded.dtype.itemsize, limit, outputs)
        job = EmbedJob(info, source, options, limit, budget, named=tokens_per_batch != "auto")
        with output_folder(output) as folder:
            run(job, folder.path, progress)
    return Embeddings(folder)


def _stretches(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of residues of the concatenated proteins whose masked copies have `budget` tokens at most (or 1 copy)."""
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
    layers = options.layer_numbers(model.config)
    encoded = model(packed, attend=attend, keep=layers)
    rows = residue_rows(packed, model.alphabet)
    breaks = chain_breaks("".join(texts))
    # `|` between chains is no residue
    counts = [len(text) - text.count(CHAIN_BREAK) for text in texts]
    residues = rows[torch.from_numpy(~breaks).to(rows.device)] if breaks.any() else rows
    for layer in layers:
        hidden = encoded.layers[layer]
        if "mean" in options.include:
            # one protein at a time, since a running sum over all in float32 would lose digits
            parts = hidden[residues].float().split(counts)
            yield f"mean/{layer}", protein, _numpy(torch.stack([part.mean(0) for part in parts]))
        if "bos" in options.include:
            yield f"bos/{layer}", protein, _numpy(hidden[packed.cu_seqlens[:-1].long()])
        if "per-tok" in options.include:
            yield f"per_tok/{layer}", residue, _numpy(hidden[rows])
    if "logits" in options.include:
        yield "logits", residue, _numpy(model.logits(encoded.last[rows]))
    if "surprise" in options.include and options.surprise == "wt":
        for name, values in _surprise_arrays(residue_predictions(model, packed, encoded, rows), breaks):
            yield name, residue, values


def _surprise_arrays(rows: Predictions, breaks: NDArray[np.bool_]) -> Iterator[tuple[str, NDArray[Any]]]:
    """`breaks`: the rows between chains, where nothing is predicted: NaN, and rank 0."""
    for name in SURPRISE:
        values = getattr(rows, name).cpu().numpy().astype(np.int32 if name == "rank" else np.float32)
        values[breaks] = 0 if name == "rank" else np.nan
        yield name, values


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()
