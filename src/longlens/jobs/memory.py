"""The predicted peak memory of the whole process of a job, computed before the weights are read.

    peak = libraries + weights + the largest of (further memory while loading, a batch, writing the results)

as the resident set of the process (RSS) on a CPU; on a GPU the memory of the device, without libraries. Libraries are
what this process holds now, since the commands import the same ones, and what a job imports later. The constants were
measured on Linux x86-64 with PyTorch 2.13 for CPUs; `tests/jobs/test_memory_prediction.py` compares them with a
process.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from longlens.errors import InputError
from longlens.jobs.plan import SHARE, BatchOutputs, batch_bytes, free_bytes, parse_bytes
from longlens.models.encoder import EncoderConfig
from longlens.models.parts.positions import LearnedPositions, RelativePositions
from longlens.models.pretrained import check_dtype, choose_device, choose_dtype, read_config

MIB = 2**20
# torch._dynamo, which building a model imports
LATER = 80 * MIB
# file pages that are mapped while tensors are read one by one, beside the largest tensor
MAPPED = 128 * MIB
# a batch's kernels and thread stacks, and the allocator's rounding of everything else
KERNELS, SLACK = 80 * MIB, 1.1
# libraries for files, and the tables, while results are written
WRITING = 176 * MIB


@dataclass(frozen=True)
class ModelSize:
    """The size of a model, known before its weights are read; `dtype` and `device` are those that it will have."""

    config: EncoderConfig
    dtype: torch.dtype
    device: torch.device

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return parameter_count(self.config) * self.dtype.itemsize

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor of a checkpoint in float32."""
        config = self.config
        positions = config.positions.rows if isinstance(config.positions, LearnedPositions) else 0
        return 4 * config.width * max(config.feed_forward, config.width, config.inner, config.vocabulary, positions)


@dataclass(frozen=True)
class PeakMemory:
    """Predicted bytes of a process at its peak: libraries and weights, which are held throughout, and three parts that
    are held at different times."""

    libraries: int
    weights: int
    loading: int
    batch: int
    writing: int

    @property
    def total(self) -> int:
        """The whole process."""
        return self.libraries + self.weights + max(self.loading, self.batch, self.writing)


def model_size(name: str | Path, dtype: str = "auto", device: str = "auto") -> ModelSize:
    """The size of a model, from its configuration alone. Arguments and errors: `longlens.load`."""
    chosen = choose_device(device)
    config, precision = read_config(name), choose_dtype(dtype, chosen)
    check_dtype(config, precision, str(name))
    return ModelSize(config, precision, chosen)


def parameter_count(config: EncoderConfig) -> int:
    """The number of parameters of a `MaskedLM`, including its contact head."""
    width = config.width
    layer = config.projections.count(width, config.inner) + config.feed.count(width, config.feed_forward)
    layers = config.layers * (layer + 2 * config.norm.count(width))
    match config.positions:
        case LearnedPositions(rows, _, normed):
            positions = rows * width + normed * config.norm.count(width)
        case RelativePositions(buckets):
            positions = buckets * config.heads
        case _:
            positions = 0
    last = (config.last_norm or config.norm).count(width)
    head = config.head.count(width, config.vocabulary) if config.head else 0
    contacts = config.layers * config.heads + 1
    return config.vocabulary * width + positions + layers + last + head + contacts


def process_bytes() -> int:
    """The resident memory of this process now (RSS)."""
    return int(psutil.Process().memory_info().rss)


def predict_peak(size: ModelSize, tokens: int, outputs: BatchOutputs) -> PeakMemory:
    """The peak of a process like this one whose largest batch has `tokens` tokens."""
    batch = batch_bytes(size.config, tokens, size.dtype.itemsize, outputs)
    if size.device.type != "cpu":
        return PeakMemory(0, size.weights, size.largest, int(SLACK * batch), 0)
    libraries = process_bytes() + (0 if "torch._dynamo" in sys.modules else LATER)
    return PeakMemory(libraries, size.weights, size.largest + MAPPED, int(SLACK * batch) + KERNELS, WRITING)


def total_limit(max_memory: str | None, device: torch.device) -> int:
    """Bytes that the whole process may hold: `max_memory`, or what it holds now and `SHARE` of the free memory."""
    if max_memory is not None:
        return parse_bytes(max_memory)
    # PyTorch's cache of freed blocks is not free for others, but it is for this process
    in_use = process_bytes() if device.type == "cpu" else torch.cuda.memory_reserved(device)
    return in_use + int(SHARE * free_bytes(device))


def batch_limit(total: int, in_use: int, device: torch.device) -> int:
    """Bytes of `batch_bytes` that leave a process within `total`, where it holds `in_use` bytes beside the batch.

    Raises `InputError` if nothing is left.
    """
    available = total - in_use
    if device.type == "cpu":
        if available < WRITING:
            raise InputError(
                f"the model and PyTorch hold {in_use / 2**30:.2f} GiB, writing the results takes "
                f"{WRITING / 2**30:.2f} GiB, and {total / 2**30:.2f} GiB are allowed; raise --max-memory, or use "
                "--dtype bfloat16 or a smaller model"
            )
        available -= KERNELS
    return int(available / SLACK)


def refuse_large_model(size: ModelSize, max_memory: str | None) -> None:
    """Raise `InputError` if loading alone would take more than is allowed; called before the weights are read."""
    total = total_limit(max_memory, size.device)
    peak = predict_peak(size, 0, BatchOutputs(0, 0))
    need = peak.libraries + peak.weights + max(peak.loading, peak.writing)
    if need > total:
        raise InputError(
            f"loading the model takes about {need / 2**30:.2f} GiB ({peak.weights / 2**30:.2f} GiB of weights, the "
            f"rest PyTorch and the reading of the file) and {total / 2**30:.2f} GiB are allowed for the whole process; "
            "raise --max-memory, use --dtype bfloat16 or a smaller model"
        )
