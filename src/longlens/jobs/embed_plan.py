"""The plan of `longlens embed`, made before weights are read: batches, memory of the whole process, time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from longlens.errors import InputError
from longlens.io.survey import Survey
from longlens.jobs.embed import EmbedOptions, embedding_outputs
from longlens.jobs.memory import ModelSize, PeakMemory, batch_limit, predict_peak, total_limit
from longlens.jobs.plan import (
    batch_tokens,
    largest_batch,
    make_batches,
    masked_operations,
    operations,
    standard_bytes,
)
from longlens.jobs.runner import described


@dataclass(frozen=True)
class EmbedPlan:
    """`refusal` says why the job does not fit into `limit` bytes; it is empty if the job fits.

    `budget` is the number of tokens in a batch, `largest` that of the largest batch. `operations` are multiplications
    and additions; divided by a machine's rate they estimate the time. `standard` is the N x N weights of one layer.
    """

    peak: PeakMemory
    limit: int
    budget: int
    batches: int
    largest: int
    operations: float
    standard: int
    refusal: str


def plan_embedding(
    size: ModelSize,
    survey: Survey,
    *,
    include: Collection[str] = ("mean",),
    layers: Collection[int | str] = (-1,),
    masked: bool = False,
    max_memory: str | None = None,
    tokens_per_batch: int | str = "auto",
) -> EmbedPlan:
    """The plan of embedding the proteins of a survey by exact attention in a separate process.

    Args:
        size: the model, from `longlens.jobs.memory.model_size`.
        survey: the proteins.
        include: what to compute: "mean", "per-tok", "bos", "logits", "surprise".
        layers: from 0, the embedding, to the number of layers; -1 is the last; "all".
        masked: whether surprise masks each residue in turn.
        max_memory: limit of the whole process, such as "16G"; None is 80 % of free memory.
        tokens_per_batch: "auto", or a number.

    Raises:
        InputError: an invalid amount of memory or number of tokens, or an unknown name in `include`.
    """
    options = EmbedOptions(include=tuple(include), layers=tuple(layers), surprise="masked" if masked else "wt")
    config, outputs = size.config, embedding_outputs(size.config, options)
    total = total_limit(max_memory, size.device)
    fixed = predict_peak(size, 0, outputs)
    refusal, limit = "", 0
    try:
        limit = batch_limit(total, fixed.libraries + fixed.weights, size.device)
    except InputError as error:
        refusal = str(error)
    budget = batch_tokens(tokens_per_batch, config, size.dtype.itemsize, limit, outputs)
    lengths = [entry.length for entry in survey.entries]
    longest = survey.longest
    largest = largest_batch(lengths, budget)
    peak = predict_peak(size, largest_batch(lengths, budget, masked=masked), outputs)
    name = described(longest)
    if config.max_length is not None and longest.length + 2 > config.max_length:
        refusal = f"{name}: expected at most {config.max_length - 2} residues for this model"
    elif not refusal and peak.total > total:
        refusal = (
            f"{name if largest == longest.length + 2 else f'batches of {budget:,} tokens'}: the process would hold "
            f"{peak.total / 2**30:.2f} GiB and {total / 2**30:.2f} GiB are allowed; raise --max-memory, use --dtype "
            "bfloat16, include less, or a smaller model"
        )
    work = operations(config, lengths) + (masked_operations(config, lengths) if masked else 0.0)
    return EmbedPlan(
        peak, total, budget, sum(1 for _ in make_batches(lengths, budget)), largest, work,
        standard_bytes(config, longest.length + 2, size.dtype.itemsize), refusal,
    )  # fmt: skip
