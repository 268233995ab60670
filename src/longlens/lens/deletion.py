"""What hiding keys would do to a number that a model computes, to first order and for all keys at once.

For a number s, such as the surprise of one token, with attention weights A, values v, outputs o and g = ds/do of each
layer and head, and queries i:

    a_j  = sum_i A_ij g_i . (o_i - v_j)                                    single keys, the linear form
    d(S) = sum_i g_i . (o_i^-S - o_i)
         = sum_i (sum_{j not in S} A_ij g_i . (v_j - o_i) - s_i g_i . o_i) / (1 - m_i)
    o_i^-S = sum_{j not in S} A_ij v_j / (1 - m_i),   m_i = sum_{j in S} A_ij,   s_i = 1 - sum_j A_ij

o_i^-S is the output of query i when the keys S are hidden from it and the softmax is taken over the rest: exact within
one layer, and first order in what follows (attribution patching, Nanda 2023; AtP*, Kramar et al. 2024,
arXiv:2403.00745). Both are added over layers and heads. a_j is minus the derivative of s by a bias on the scores of key
j in every layer. In d(S) the queries of S itself are left out, unless s is read there: once S is hidden in every
layer, nothing reads their outputs. So is a query that S leaves less than `LEAST` of its mass, for which there is no
such output. What is left is added up itself, so that nothing cancels where S has nearly all of the mass: 1 - m_i is the
mass of the keys outside S and s_i, that of an attention sink, which no span hides; 0 without sinks.

One sweep over the tiles of the attention matrix per layer: memory is linear in the length, plus queries of one tile x
spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.errors import InputError, UnsupportedError
from longlens.lens.block import Block, Extent
from longlens.lens.calls import scan_call
from longlens.lens.collect.collector import Collector, State
from longlens.lens.results import Weights
from longlens.ops.exact.exact import Exact
from longlens.ops.inputs import wide_dtype
from longlens.ops.observe import AttentionCall
from longlens.ops.registry import resolve_method
from longlens.ops.tiles.index import positions, take

# the mass that must be left to a query for its softmax to be taken over the rest
LEAST = 1e-12

Span: TypeAlias = tuple[int, int]
"""Tokens first..last of a sequence, the last exclusive."""


@dataclass
class Passes:
    """What a model has computed so far, in passes of a whole sequence. `pieces`: tokens of parts of it, run alone.

    `tokens`: those that all forward passes computed; fewer than passes times tokens where a prefix was shared. A
    backward pass is the gradients, one sweep over the attention of each layer and, in models of longlens, each layer's
    forward once more.
    """

    forward: int = 0
    backward: int = 0
    pieces: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Estimate:
    """First-order effects on each of T targets: of hiding each key (T, N), and each of the spans (T, K)."""

    keys: NDArray[np.float64]
    spans: NDArray[np.float64]


class Hideable(Protocol):
    """One sequence and a model that predicts its tokens, parts of which can be hidden. Tokens count from 0.

    `causal`: a token is predicted from those before it alone. `special` (N,): start, end and the like.
    """

    passes: Passes
    causal: bool
    labels: Sequence[str]
    special: NDArray[np.bool_]

    def find(self, word: str) -> list[int]:
        """The tokens of a word, where the sequence has words."""

    def text(self, span: Span) -> str:
        """What stands in a span, as it stands in the sequence."""

    def leaves_no_key(self, target: int, span: Span) -> bool:
        """Whether the query that predicts the target has no key left in some layer once the span is hidden, so that
        its softmax, and the surprise, do not exist."""

    def surprise(self, targets: Sequence[int], hidden: Sequence[Span | None] | None = None) -> NDArray[np.float64]:
        """-log p of each target in nats, with a span of keys hidden from every query in every layer; NaN where that
        `leaves_no_key`."""

    def estimate(self, targets: Sequence[int], spans: Sequence[Span]) -> Estimate:
        """The first-order effects of hiding each key and each span, by a forward and a backward pass per target."""

    def in_pieces(self, targets: Sequence[int], pieces: Sequence[Span]) -> NDArray[np.float64]:
        """-log p of each target where the model is given one piece of the sequence alone, which holds the target."""


@dataclass
class DeletionSums:
    """a_j and d(S), added over the layers given to `add`.

    `spans` (K, 2): first key of each, and the key after its last. `kept` (B,): a key of each batch row that no span
    hides, -1 for none; `readers` (B,): the token of each row at whose output s is read. After the layers, `keys` (B, N)
    holds a_j and `of_spans` (B, K) d(S), in float64.
    """

    batch: int
    tokens: int
    spans: Sequence[tuple[int, int]]
    readers: Sequence[int]
    kept: Sequence[int] | None = None
    keys: Tensor = field(init=False)
    of_spans: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if any(not 0 <= start < stop <= self.tokens for start, stop in self.spans):
            raise InputError(f"expected spans of keys in 0..{self.tokens}, none of them empty, got {list(self.spans)}")
        self.keys = torch.zeros(self.batch, self.tokens, dtype=torch.float64)
        self.of_spans = torch.zeros(self.batch, len(self.spans), dtype=torch.float64)

    def add(self, call: AttentionCall) -> None:
        """Add a layer: an exact attention call with its output and `output_gradient`.

        Raises:
            UnsupportedError: another method of attention than exact.
            LensError: the weights do not give the call's own output.
        """
        if not isinstance(resolve_method(call.settings.get("method", "exact")), Exact):
            raise UnsupportedError(
                f"layer {call.layer} ({call.name}): the effect of hiding keys is estimated for exact attention, got "
                f"method '{call.settings['method']}'"
            )
        if call.output_gradient is None or call.output is None:
            raise InputError(f"expected a call with output and output_gradient, layer {call.layer} has none")
        collector = _Deletion(self, call)
        scan_call(call, [collector])
        self.keys += collector.keys.cpu()
        self.of_spans += collector.of_spans.cpu()


class _Deletion(Collector):
    """The two sums over one layer's blocks. BH: batch rows and heads, flattened."""

    def __init__(self, sums: DeletionSums, call: AttentionCall) -> None:
        query, output, gradient = call.query, call.output, call.output_gradient
        assert output is not None
        assert gradient is not None
        self.heads = query.shape[1]
        self.gradient, output = gradient.flatten(0, 1), output.flatten(0, 1)
        # (BH, Nq, 1): g_i . o_i
        wide = wide_dtype(query.dtype)
        self.slope = (self.gradient.to(wide) * output.to(wide)).sum(-1, keepdim=True)
        groups = self.heads // call.value.shape[1]
        self.value = call.value.repeat_interleave(groups, 1).flatten(0, 1)
        device = query.device
        spans = torch.tensor(list(sums.spans), dtype=torch.int64, device=device).view(-1, 2)
        self.starts, self.stops = spans.unbind(1)
        kept = [-1] * sums.batch if sums.kept is None else list(sums.kept)
        self.kept, self.readers = torch.tensor([kept, list(sums.readers)], dtype=torch.int64, device=device)
        self.keys = torch.zeros(sums.batch, sums.tokens, dtype=torch.float64, device=device)
        self.of_spans = torch.zeros(sums.batch, len(spans), dtype=torch.float64, device=device)
        sinks: Tensor | None = call.settings.get("sinks")
        # (H,) logits
        self.sinks = None if sinks is None else sinks.detach().to(device, torch.float64)

    @property
    def name(self) -> str:
        return "deletion"

    def start(self, extent: Extent) -> State[Weights]:
        return _Deleted(self)


class _Deleted(State[Weights]):
    """Adds up blocks. The blocks of the same rows follow one another; a row is finished when all of them are there."""

    def __init__(self, collector: _Deletion) -> None:
        self.collector = collector
        # of the rows at hand: which they are, and for each span (heads, rows, K) the mass outside of it and its gain
        self.heads, self.rows = slice(0, 0), slice(0, 0)
        self.left, self.gain = torch.empty(0), torch.empty(0)

    def update(self, block: Block) -> None:
        own, keys, rows = self.collector, block.absolute_keys(), block.absolute_rows()
        if not isinstance(keys, slice) or not isinstance(rows, slice):
            raise UnsupportedError("the effect of hiding keys is estimated for exact attention alone")
        p = block.weights
        gradient = take(own.gradient, block.heads, rows).to(p.dtype)
        value = take(own.value, block.heads, keys).to(p.dtype)
        slope = take(own.slope, block.heads, rows).to(p.dtype)
        gain = (slope - torch.bmm(gradient, value.transpose(1, 2))).mul_(p)
        if block.allowed is not None:
            # a masked key's value may be NaN: it must not count
            gain.masked_fill_(~block.allowed, 0.0)
        of_row = torch.arange(block.heads.start, block.heads.stop, device=p.device) // own.heads
        own.keys[:, keys].index_add_(0, of_row, gain.sum(1, dtype=torch.float64))
        if not len(own.starts):
            return
        if (self.heads, self.rows) != (block.heads, rows):
            self._finish()
            self.heads, self.rows = block.heads, rows
            sink = self._sink(block)
            self.left = sink.expand(*p.shape[:2], len(own.starts)).clone()
            self.gain = -slope * self.left
        kept = own.kept[of_row]
        self.left += _outside(p, keys, own.starts, own.stops, kept)
        self.gain -= _outside(gain, keys, own.starts, own.stops, kept)

    def _sink(self, block: Block) -> Tensor:
        """The mass (heads, rows, 1) of the sink of each row, float64; 0 without sinks, and in a row without keys."""
        if self.collector.sinks is None:
            return block.weights.new_zeros(*block.weights.shape[:2], 1, dtype=torch.float64)
        of_head = torch.arange(block.heads.start, block.heads.stop, device=block.lse.device) % self.collector.heads
        lse = block.lse.double()
        mass = (self.collector.sinks[of_head].unsqueeze(1) - lse).exp()
        return mass.masked_fill(lse == -torch.inf, 0.0).unsqueeze(2)

    def _finish(self) -> None:
        """Add the rows at hand to the spans' sums."""
        own, heads = self.collector, self.heads
        if heads.start == heads.stop:
            return
        device = self.left.device
        of_row = torch.arange(heads.start, heads.stop, device=device) // own.heads
        rows = positions(self.rows, 0, device).unsqueeze(1)
        unread = (rows >= own.starts) & (rows < own.stops)
        unread = unread & (rows.unsqueeze(0) != own.readers[of_row].view(-1, 1, 1))
        sums = (self.gain / self.left).masked_fill(unread | (self.left < LEAST), 0.0).sum(1)
        own.of_spans.index_add_(0, of_row, sums)
        self.heads = slice(0, 0)

    def merge(self, other: _Deleted) -> None:
        raise NotImplementedError

    def result(self) -> Weights:
        self._finish()
        values = self.collector.keys.view(len(self.collector.keys), 1, 1, -1)
        return Weights("deletion", values, torch.arange(1), torch.arange(values.shape[3]))


def _outside(values: Tensor, keys: slice, starts: Tensor, stops: Tensor, kept: Tensor) -> Tensor:
    """Sums (heads, rows, K) of `values` (heads, rows, keys) over the keys outside each span, the kept key (heads,) with
    them."""
    width = values.shape[2]
    # differences of a running sum, in float64, which loses nothing that float32 has
    running = torch.nn.functional.pad(values.cumsum(2, dtype=torch.float64), (1, 0))
    first, last = ((bound - keys.start).clamp(0, width) for bound in (starts, stops))
    sums = running[..., -1:] - running.index_select(2, last) + running.index_select(2, first)
    there = (kept >= keys.start) & (kept < keys.stop)
    column = (kept - keys.start).clamp(0, width - 1).view(-1, 1, 1).expand(-1, values.shape[1], 1)
    inside = (kept.unsqueeze(1) >= starts) & (kept.unsqueeze(1) < stops) & there.unsqueeze(1)
    return sums + values.gather(2, column).double() * inside.unsqueeze(1)
