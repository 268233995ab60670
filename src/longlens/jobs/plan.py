"""The plan of a job before it starts: batches by a token budget, peak memory, time."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from longlens.errors import InputError
from longlens.models.encoder import CHUNK, EncoderConfig, Layer, Places, attend_with
from longlens.models.language_model import CHUNK as LOGITS_CHUNK
from longlens.models.parts.positions import RelativePositions
from longlens.models.rotary import Rotary

# the scores of attention's tiles, and their temporaries
TILES = 2**24
# larger batches are not faster
MOST_TOKENS = 16_384
# the part of the free memory that a job uses by default
SHARE = 0.8


@dataclass(frozen=True)
class BatchOutputs:
    """The outputs of a batch that are kept until they are written: float32 values for each residue, and layers."""

    residue_values: int
    layers: int


def batch_bytes(config: EncoderConfig, tokens: int, element: int, outputs: BatchOutputs) -> int:
    """Peak growth of memory, in bytes, of one packed forward pass over `tokens` tokens.

    Held throughout are rotary angles, layers that are kept, and outputs until they are written. To these comes the
    largest of attention (residual stream, queries, keys and values, and its output by sequence and joined), the
    feed-forward block of a chunk, and the logits of a chunk.
    """
    stream = tokens * config.width * element
    stored = stream * outputs.layers + 3 * tokens * config.head_width * 4 + 2 * tokens * outputs.residue_values * 4
    mixed = tokens * config.inner * element
    # a bias of distances takes the queries in reverse order (`longlens.ops.exact.diagonals`)
    reversed_too = isinstance(config.positions, RelativePositions)
    attending = stream + (3 + 2 + reversed_too) * mixed
    wide = config.feed.activations * config.feed_forward
    feeding = stream + mixed + min(tokens, CHUNK) * (wide + 4 * config.width) * element
    predicting = stream + min(tokens, LOGITS_CHUNK) * 4 * (config.vocabulary + config.width) * 4
    return stored + TILES + max(attending, feeding, predicting)


def training_bytes(config: EncoderConfig, tokens: int, *, recompute: bool = True) -> int:
    """Peak growth of memory of a step of low-rank adaptation, in float32: what enters each layer, and the activations
    and gradients of one layer, or, without `recompute`, of all."""
    normed = 2 * config.inner if config.projections.query_key_norm else 0
    activations = 4 * config.width + 6 * config.inner + normed + (2 + 2 * config.feed.gated) * config.feed_forward
    # measured in an ordinary process: 3.2 in the layer that is computed backwards, 1.1 in each that keeps its own
    held = 3.5 * activations + config.layers * (config.width if recompute else 1.2 * activations)
    return TILES + int(4 * tokens * held)


def standard_bytes(config: EncoderConfig, tokens: int, element: int) -> int:
    """Bytes of the N x N attention weights of one layer, all heads, which eager attention holds for one sequence."""
    return config.heads * tokens * tokens * element


def free_bytes(device: torch.device) -> int:
    """Memory free now on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory() -> int:
    """The peak memory of this process so far, in bytes."""
    # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parse_bytes(text: str) -> int:
    """ "16G" -> 17179869184; raises `InputError`."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if not isinstance(text, str):
        raise InputError(f"expected an amount of memory as a text such as '16G', got {text!r}")
    stripped = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = units.get(stripped[-1:], 1)
    try:
        count = float(stripped[:-1] if stripped[-1:] in units else stripped) * factor
    except ValueError:
        count = 0.0
    if not 0 < count < 2**60:
        raise InputError(f"expected an amount of memory such as 16G or 800M, got {text!r}")
    return int(count)


def batch_tokens(chosen: int | str, config: EncoderConfig, element: int, limit: int, outputs: BatchOutputs) -> int:
    """Tokens in a batch: the number that the user chose, or, for "auto", as many as fit in `limit` bytes, up to a size
    beyond which batches are not faster. Raises `InputError` if `chosen` is neither."""
    if chosen == "auto":
        tokens = MOST_TOKENS
        while tokens > 512 and batch_bytes(config, tokens, element, outputs) > limit:
            tokens //= 2
        return tokens
    if not str(chosen).isdigit() or int(chosen) < 1:
        raise InputError(f"expected --tokens-per-batch auto or a whole number, got {chosen!r}")
    return int(chosen)


def largest_batch(lengths: Sequence[int], budget: int, *, masked: bool = False) -> int:
    """Tokens of the largest batch; with `masked`, also of the copies of proteins with each residue masked in turn,
    which form batches of the same budget, or single copies."""
    largest = max((sum(lengths[a:b]) + 2 * (b - a) for a, b in make_batches(lengths, budget)), default=0)
    return max(largest, min(budget, sum(n * (n + 2) for n in lengths))) if masked else largest


def make_batches(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of proteins, in order, of at most `budget` tokens, including start and end; a longer one is alone."""
    start = tokens = 0
    for place, length in enumerate(lengths):
        if place > start and tokens + length + 2 > budget:
            yield start, place
            start, tokens = place, 0
        tokens += length + 2
    if start < len(lengths):
        yield start, len(lengths)


def operations(config: EncoderConfig, lengths: Sequence[int]) -> float:
    """Multiplications and additions of one pass over each protein: matrix products, and attention by all pairs."""
    matrices = 4 * config.width * config.inner + (2 + config.feed.gated) * config.width * config.feed_forward
    per_token = 2 * config.layers * matrices
    return float(sum((n + 2) * per_token + 4 * config.layers * config.inner * (n + 2) ** 2 for n in lengths))


def masked_operations(config: EncoderConfig, lengths: Sequence[int]) -> float:
    """The same for one pass over each protein for each of its residues, masked in turn."""
    return float(sum(n * operations(config, [n]) for n in lengths))


def measure_rate(config: EncoderConfig, dtype: torch.dtype, device: torch.device, operations_: float = 2e10) -> float:
    """Operations per second of one layer of random weights, the faster of two runs of about `operations_` operations.

    No weights are read, and the measurement takes a second or two for any size of the model.
    """
    one = replace(config, layers=1)
    tokens = max(64, min(1024, int(operations_ / operations(one, [0]) * 2)))
    layer = Layer(one).to(device=device, dtype=dtype).eval().requires_grad_(False)
    angles = Rotary(config.head_width).to(device)(torch.arange(tokens, device=device)) if config.rotary else None
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    attend, seconds = attend_with(), []
    for _ in range(3):
        x = torch.ones(tokens, config.width, dtype=dtype, device=device)
        started = time.perf_counter()
        with torch.inference_mode():
            layer(x, Places(bounds, angles), attend, 0).sum().item()
        seconds.append(time.perf_counter() - started)
    return operations(one, [tokens - 2]) / min(seconds[1:])
