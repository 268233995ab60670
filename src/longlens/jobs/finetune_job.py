"""The job that fine-tunes a model: `longlens.finetune` and `longlens finetune`.

Units of work, in order: the comparison of the proteins (clusters, split, nearest training proteins); the frozen
vectors, a batch at a time; the linear probe and the baselines; rounds of training the head; rounds of low-rank
adaptation. Each stage begins at the best step of the one before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.errors import InputError
from longlens.finetuning.baselines import Known, baseline_outputs
from longlens.finetuning.comparison import Comparison, refuse_missing
from longlens.finetuning.head import Head, head_outputs, readable
from longlens.finetuning.lora import Adapters
from longlens.finetuning.outcome import Outcome
from longlens.finetuning.probe import Linear, fit_probe
from longlens.finetuning.rows import MOST_ROWS, Vectors, gather
from longlens.finetuning.saved import FILE as HEAD
from longlens.finetuning.saved import MODEL, HeadInfo, save_head
from longlens.finetuning.splits import Split
from longlens.finetuning.targets import Targets, class_weights
from longlens.finetuning.trainer import Stage, TuneSettings, loss_warning, read_state, write_state
from longlens.io.results import ArraySpec, ResultFolder, write_whole
from longlens.io.targets import LabelledProtein
from longlens.jobs.base_model import described_base
from longlens.jobs.inference import refuse_overflow, residue_vectors
from longlens.jobs.inputs import ProteinSource
from longlens.jobs.job_key import ModelInfo, job_key
from longlens.jobs.plan import BatchOutputs, batch_bytes, largest_batch, make_batches, training_bytes
from longlens.jobs.progress import Notice, ProgressCallback, StageProgress, only_warnings
from longlens.jobs.runner import Job, Rows, Unit, UnitMemory, described, residue_units
from longlens.models.pretrained import save

METHODS = ("probe", "head", "lora")
# more proteins than this take hours to compare
MANY = 20_000
SPLIT, PROBE = "split.json", "probe.pt"


@dataclass(frozen=True)
class FinetuneOptions:
    """What is fitted (`method`: up to which stage) and how the proteins are divided (`split`)."""

    method: str
    split: str
    settings: TuneSettings

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"expected a method of {', '.join(METHODS)}, got {self.method!r}")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are trained by steps."""
        return METHODS[1 : METHODS.index(self.method) + 1]


@dataclass
class FinetuneJob(Job):
    """Units: the module's docstring. `budget`: tokens of a batch of frozen vectors; `given_clusters`: (P,) or None."""

    grad_mode = torch.no_grad

    model: ModelInfo
    source: ProteinSource
    proteins: list[LabelledProtein]
    targets: Targets
    options: FinetuneOptions
    limit: int
    budget: int
    given_clusters: NDArray[np.int64] | None = None
    progress: ProgressCallback = only_warnings
    report: dict[str, Any] = field(default_factory=dict, init=False)

    @cached_property
    def sequences(self) -> list[str]:
        """The cleaned sequences."""
        return [protein.sequence for protein in self.proteins]

    @cached_property
    def lengths(self) -> list[int]:
        """Residues of each protein."""
        return [len(sequence) for sequence in self.sequences]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The bounds of proteins among the rows of the frozen vectors."""
        counts = self.lengths if self.targets.task.by_residue else [1] * len(self.proteins)
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest training step."""
        most = min(self.options.settings.tokens, sum(self.lengths) + 2 * len(self.lengths))
        return max(most, max(self.lengths) + 2)

    @property
    def key(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for protein in self.proteins:
            digest.update(f"{protein.record.id}\t{protein.set}\t{';'.join(protein.targets)}\n".encode())
        if self.given_clusters is not None:
            digest.update(self.given_clusters.tobytes())
        chosen = {"task": self.targets.task.name, "method": self.options.method, "split": self.options.split,
                  "targets_sha256": digest.hexdigest(), **asdict(self.options.settings)}  # fmt: skip
        return job_key(self.model, self.source.survey, chosen)

    @property
    def specs(self) -> list[ArraySpec]:
        axis = "residue" if self.targets.task.by_residue else "protein"
        return [ArraySpec("vectors", axis, (self.model.language_model.config.width,))]

    @property
    def first_run_choices(self) -> dict[str, Any]:
        return {"tokens_per_batch": self.budget, "model": self.model.name}

    def memory(self, first_run_choices: dict[str, Any]) -> UnitMemory:
        model, longest = self.model.language_model, self.source.survey.longest
        config, smaller = model.config, "use a smaller model"
        tokens = largest_batch(self.lengths, int(first_run_choices["tokens_per_batch"]))
        forward = batch_bytes(config, tokens, model.dtype.itemsize, BatchOutputs(config.width, 1))
        rows = min(MOST_ROWS, int(self.starts[-1]))
        fitting = rows * config.width * 32
        needs = [
            UnitMemory(forward, f"a batch of {tokens:,} tokens", "leave out the longest proteins", chosen=True),
            UnitMemory(fitting, f"the probe on {rows:,} vectors", smaller),
        ]
        if self.options.method == "lora":
            step = self.step_tokens
            alone = step == longest.length + 2
            unit = described(longest) if alone else f"a training step of {step:,} tokens"
            advice = "leave it out" if alone else f"lower --tokens, or {smaller}"
            needs.append(UnitMemory(training_bytes(config, step), unit, advice))
        return max(needs, key=lambda need: need.bytes)

    def units(self, first_run_choices: dict[str, Any]) -> Iterator[Unit]:
        count, settings = len(self.proteins), self.options.settings
        yield Unit(0, 0, StageProgress("compare", 2 * count, 2 * count, "steps"))
        batches = list(make_batches(self.lengths, int(first_run_choices["tokens_per_batch"])))
        yield from residue_units("vectors", self.lengths, batches)
        yield Unit(0, 0, StageProgress("probe", 1, 1, "fits"))
        for stage in self.options.stages:
            for number in range(settings.rounds):
                done = min((number + 1) * settings.every, settings.steps)
                yield Unit(0, 0, StageProgress(stage, done, settings.steps, "steps"), number, number + 1)

    def compute(self, unit: Unit, texts: list[str], folder: ResultFolder) -> Iterable[Rows]:
        stage = unit.step.stage
        if stage == "vectors":
            vectors = self._vectors(texts)
            refuse_overflow(vectors, self.proteins[unit.first].record.id, self.model.dtype)
            yield "vectors", int(self.starts[unit.first]), vectors
        elif stage == "compare":
            write_whole(folder.work / SPLIT, self._compare().as_json())
        elif stage == "probe":
            write_state(folder.work / PROBE, self._fit_probe(folder))
        else:
            self._train(stage, unit.start, folder)

    @torch.no_grad()
    def finish(self, folder: ResultFolder) -> list[Path]:
        comparison, method = self.comparison(folder), self.options.method
        stages, kept = self._described_stages(folder), folder.work / "final"
        kept.mkdir(exist_ok=True)
        outcome = Outcome(
            self.targets, [protein.record.id for protein in self.proteins], comparison.split, comparison.clusters,
            comparison.leaks(), comparison.warnings(), method, self._outputs(folder, comparison.split), stages,
            self.options.settings.seed,
        )  # fmt: skip
        self.report, files = outcome.write(kept)
        base = {} if method == "lora" else described_base(self.model)
        info = HeadInfo(self.targets.task.name, self.targets.classes, method, outcome.thresholds[method],
                        self.options.settings.hidden, base)  # fmt: skip
        save_head(self.best_head(folder, method), info, kept / HEAD)
        files.append(kept / HEAD)
        if method == "lora":
            with self._best_adapters(folder).merged():
                save(self.model.language_model, kept / MODEL)
            files.append(kept / MODEL)
        return [folder.place(file) for file in files]

    def _described_stages(self, folder: ResultFolder) -> dict[str, Any]:
        """For the report: the probe's penalty, and the losses of each stage by step."""
        described: dict[str, Any] = {"probe": {"strength": self.read_probe(folder)[0].strength}}
        for name in self.options.stages:
            state = self.state(folder, name)
            described[name] = {
                "steps": state["step"], "best_step": state["best_step"], "first_loss": state["log"][0][2],
                "best_loss": state["best_loss"], "log": state["log"],
            }  # fmt: skip
        return described

    def _outputs(self, folder: ResultFolder, split: Split) -> dict[str, dict[int, NDArray[np.float64]]]:
        """Outputs of the baselines and of each stage for validation and test proteins."""
        held_out = split.members("validation") + split.members("test")
        baselines = self.read_probe(folder)[1]
        outputs = {name: dict(zip(held_out, parts, strict=True)) for name, parts in baselines.items()}
        frozen = self.frozen(folder)
        for name in ("probe", *self.options.stages):
            head = self.best_head(folder, name)
            if name == "lora":
                with self._best_adapters(folder).merged():
                    outputs[name] = self._adapted_outputs(head, held_out)
            else:
                outputs[name] = {
                    number: readable(head, torch.tensor(np.asarray(frozen.of(number))), self.targets)
                    for number in held_out
                }
        return outputs

    def _adapted_outputs(self, head: Head, proteins: list[int]) -> dict[int, NDArray[np.float64]]:
        """Outputs of the model as it is now, a batch of proteins at a time."""
        outputs: dict[int, NDArray[np.float64]] = {}
        for first, last in make_batches([self.lengths[number] for number in proteins], self.budget):
            batch = proteins[first:last]
            parts = head_outputs(head, residue_vectors(self.model.language_model, [self.sequences[n] for n in batch]),
                                 self.targets)  # fmt: skip
            outputs |= dict(zip(batch, parts, strict=True))
        return outputs

    def _best_adapters(self, folder: ResultFolder) -> Adapters:
        adapters, best = self.new_adapters(), self.state(folder, "lora")["best"]
        with torch.no_grad():
            for name, parameter in adapters.parameters().items():
                parameter.copy_(best[name])
        return adapters

    # ---- comparison

    def _compare(self) -> Comparison:
        count = len(self.proteins)
        if self.given_clusters is None and count > MANY:
            self.progress(Notice(f"comparing {count:,} proteins takes long; give --clusters of MMseqs2", warning=True))

        def step(done: int) -> None:
            if done % 100 == 0:
                self.progress(StageProgress("compare", done, 2 * count, "steps"))

        comparison = Comparison.make(
            self.sequences, [protein.set for protein in self.proteins], self.options.split, self.given_clusters,
            self.options.settings.seed, step,
        )  # fmt: skip
        refuse_missing(comparison.split, self.targets)
        for warning in comparison.warnings():
            self.progress(Notice(warning, warning=True))
        return comparison

    # ---- vectors, probe, training

    def _vectors(self, texts: list[str]) -> NDArray[Any]:
        """Frozen vectors of the last layer: of each residue, or their mean."""
        residues = residue_vectors(self.model.language_model, texts)
        if self.targets.task.by_residue:
            return torch.cat(residues).float().cpu().numpy()
        return torch.stack([vectors.float().mean(0) for vectors in residues]).cpu().numpy()

    def comparison(self, folder: ResultFolder) -> Comparison:
        """What the first unit found."""
        return Comparison.from_json((folder.work / SPLIT).read_bytes())

    def frozen(self, folder: ResultFolder) -> Vectors:
        """The frozen vectors on the disk."""
        return Vectors(folder.arrays["vectors"].read(int(self.starts[-1])), self.starts)

    def _fit_probe(self, folder: ResultFolder) -> dict[str, Any]:
        """The probe, and what the baselines predict for validation and test proteins."""
        comparison, seed = self.comparison(folder), self.options.settings.seed
        split = comparison.split
        training, validation, test = (split.members(name) for name in ("train", "validation", "test"))
        weights = class_weights(self.targets, training)
        frozen = self.frozen(folder)
        probe = fit_probe(
            self.targets, *(gather(frozen, self.targets, part, weights, seed) for part in (training, validation))
        )
        held_out = [*validation, *test]
        neighbours = [comparison.neighbours[number] for number in held_out]
        known = Known(self.sequences, self.targets, training, validation, weights)
        baselines = baseline_outputs(known, held_out, neighbours, seed)
        return {
            "probe": {name: torch.as_tensor(np.asarray(value)) for name, value in vars(probe).items()},
            "baselines": {name: [torch.from_numpy(out) for out in parts] for name, parts in baselines.items()},
        }

    def read_probe(self, folder: ResultFolder) -> tuple[Linear, dict[str, list[NDArray[np.float64]]]]:
        """What `_fit_probe` found."""
        state = read_state(folder.work / PROBE)
        entries: dict[str, Any] = {
            name: value.numpy() if value.ndim else float(value) for name, value in state["probe"].items()
        }
        outputs = {name: [out.numpy() for out in parts] for name, parts in state["baselines"].items()}
        return Linear(**entries), outputs

    def new_head(self, folder: ResultFolder) -> Head:
        """A head that begins at the probe."""
        width, settings = self.model.language_model.config.width, self.options.settings
        head = Head(width, self.targets.outputs, settings.hidden)
        head.begin(self.read_probe(folder)[0], torch.Generator().manual_seed(settings.seed))
        return head.to(self.model.device)

    def new_adapters(self) -> Adapters:
        """Adapters that change nothing yet."""
        settings = self.options.settings
        return Adapters.make(self.model.language_model, settings.rank, settings.alpha, settings.seed)

    def best_head(self, folder: ResultFolder, stage: str) -> Head:
        """The head at the best step of a stage; "probe": the probe."""
        head = self.new_head(folder)
        if stage != "probe":
            best = self.state(folder, stage)["best"]
            head.load_state_dict({name.removeprefix("head."): value for name, value in best.items()
                                  if name.startswith("head.")}, strict=False)  # fmt: skip
        return head.eval()

    def state(self, folder: ResultFolder, stage: str, number: int | None = None) -> dict[str, Any]:
        """The state of a stage after round `number`, or after the last; a stage that has ended writes no more."""
        last = self.options.settings.rounds - 1 if number is None else number
        paths = (_state_path(folder, stage, place) for place in range(last, -1, -1))
        return read_state(next(path for path in paths if path.exists()))

    def _train(self, name: str, number: int, folder: ResultFolder) -> None:
        """Round `number` of a stage."""
        before = None if number == 0 else self.state(folder, name, number - 1)
        stage = self._stage(name, folder)
        if before is not None and stage.ended(before):
            return
        after = stage.train_round(before or stage.first_state())
        write_state(_state_path(folder, name, number), after)
        warning = loss_warning(name, after["log"])
        if warning and not (before and loss_warning(name, before["log"])):
            self.progress(Notice(warning, warning=True))
        if stage.ended(after) and after["step"] < stage.settings.steps:
            self.progress(Notice(f"{name}: stopped at step {after['step']:,}, after {stage.settings.patience} "
                                 f"validations without improvement; step {after['best_step']:,} is kept"))  # fmt: skip
        # the round before may be needed again, if this one is not recorded
        _state_path(folder, name, number - 2).unlink(missing_ok=True)

    @cached_property
    def _stages(self) -> dict[str, Stage]:
        return {}

    def _stage(self, name: str, folder: ResultFolder) -> Stage:
        if name not in self._stages:
            self._stages.clear()
            self._stages[name] = self._new_stage(name, folder)
        return self._stages[name]

    def _new_stage(self, name: str, folder: ResultFolder) -> Stage:
        settings, split = self.options.settings, self.comparison(folder).split
        training, validation = split.members("train"), split.members("validation")
        weights = torch.tensor(class_weights(self.targets, training), dtype=torch.float32, device=self.model.device)
        truth = [torch.from_numpy(values).to(self.model.device) for values in self.targets.values]
        head = self.best_head(folder, "probe" if name == "head" else "head")
        parameters = {f"head.{part}": value for part, value in head.named_parameters() if part != "query"}
        frozen, active = self.frozen(folder), nullcontext
        adapted = name == "lora"
        rates = dict.fromkeys([*parameters, "head.query"], settings.head_rate)
        if adapted:
            adapters = self.new_adapters()
            parameters |= adapters.parameters()
            if not self.targets.task.by_residue:
                parameters["head.query"] = head.query
            rates = dict.fromkeys(adapters.parameters(), settings.rate) | rates
            # the numbers are the same either way
            fits = training_bytes(self.model.language_model.config, self.step_tokens, recompute=False) <= self.limit
            active = partial(adapters.trained, recompute=not fits)  # type: ignore[assignment]

        def losses(proteins: Any) -> Tensor:
            """The loss of each protein, by its frozen vectors or by those of the adapted model."""
            if adapted:
                residues = residue_vectors(self.model.language_model, [self.sequences[protein] for protein in proteins])
                vectors = list(residues) if self.targets.task.by_residue else list(head.pool(residues).split(1))
            else:
                vectors = [torch.tensor(np.asarray(frozen.of(protein))).to(weights.device) for protein in proteins]
            outputs = head(torch.cat(vectors)).split([len(part) for part in vectors])
            return head.losses(list(outputs), [truth[protein] for protein in proteins], self.targets, weights)

        return Stage(parameters, losses, training, validation, self.lengths, settings, rates, head, active)


def _state_path(folder: ResultFolder, stage: str, number: int) -> Path:
    return folder.work / f"{stage}-{number}.pt"
