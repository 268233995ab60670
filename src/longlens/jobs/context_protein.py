"""What carried the predictions of a protein: surprise with stretches hidden, its first-order estimate, and its curve.

D_t(S) = surprise_t with the keys S hidden from every query in every layer - surprise_t. Attention is the only path
between tokens, so the model then knows nothing of S but how long it is: positions stay. The target is masked, or the
model would read it. Each pair of a target and a stretch is a copy of the protein; copies are packed, up to a budget of
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.jobs.plan import BatchOutputs, batch_bytes
from longlens.lens.deletion import DeletionSums, Estimate, Passes, Span
from longlens.lens.padded import scan_shape
from longlens.models.encoder import pack
from longlens.models.language_model import MaskedLM
from longlens.ops.attention import attention
from longlens.ops.observe import AttentionCall


class ProteinContext:
    """One cleaned protein and a model. Tokens are numbered from 0, the start token; so residue n is token n.

    `budget`: tokens of copies that are computed at a time, at least one copy. `passes` counts what was computed.
    """

    causal = False

    def __init__(self, model: MaskedLM, sequence: str, budget: int = 16_384) -> None:
        model.require_head()
        self.model, self.budget = model, budget
        self.tokens = model.alphabet.encode(sequence)
        # the token that hides each token
        self.hiding = np.array([model.alphabet.masked(int(token)) for token in self.tokens])
        self.labels: Sequence[str] = tuple(model.alphabet.tokens[number] for number in self.tokens.tolist())
        self.special = np.ones(len(self.tokens), bool)
        self.special[model.alphabet.residues(len(self.tokens))] = False
        self.passes = Passes()

    def __len__(self) -> int:
        return len(self.tokens)

    def find(self, word: str) -> list[int]:
        """Nothing: a protein has no words."""
        return []

    def text(self, span: Span) -> str:
        """The residues of a stretch."""
        return "".join(self.labels[slice(*span)])

    def leaves_no_key(self, target: int, span: Span) -> bool:
        """Never: the target's own place stays in sight, and every query that is read sees itself."""
        return False

    def surprise(self, targets: Sequence[int], hidden: Sequence[Span | None] | None = None) -> NDArray[np.float64]:
        """-log p of each target token, masked, in nats, with one stretch hidden from every query in every layer.

        A stretch that holds the target leaves the target's own place in sight, where the mask token is. `hidden`: one
        stretch, or None, for each target.
        """
        stretches = [None] * len(targets) if hidden is None else list(hidden)
        out = [np.empty(0)]
        for part in self._chunks(len(targets)):
            chosen = targets[part]
            keep = _kept(len(self), chosen, stretches[part])
            self.passes.forward += len(chosen)
            self.passes.tokens += len(chosen) * len(self)
            with torch.no_grad():
                out.append(self._read(chosen, HidingAttend(len(chosen), keep)).cpu().double().numpy())
        return np.concatenate(out)

    def estimate(self, targets: Sequence[int], spans: Sequence[Span]) -> Estimate:
        """The first-order effects of hiding each key, and each of the spans, on each target; one forward and one
        backward pass for each target."""
        keys, of_spans = [], []
        for part in self._chunks(len(targets)):
            chosen = targets[part]
            sums = DeletionSums(len(chosen), len(self), spans, readers=chosen, kept=chosen)
            self.passes.forward += len(chosen)
            self.passes.backward += len(chosen)
            self.passes.tokens += len(chosen) * len(self)
            probe = torch.zeros((), dtype=self.model.dtype, device=self.model.device, requires_grad=True)
            with torch.enable_grad(), _recomputing(self.model):
                surprise = self._read(chosen, SweepingAttend(len(chosen), sums, probe))
                torch.autograd.grad(surprise.sum(), [probe])
            keys.append(sums.keys)
            of_spans.append(sums.of_spans)
        return Estimate(torch.cat(keys).numpy(), torch.cat(of_spans).numpy())

    def in_pieces(self, targets: Sequence[int], pieces: Sequence[Span]) -> NDArray[np.float64]:
        """-log p of each target, masked, where the model is given one piece of the sequence, which holds it, alone."""
        out = [np.empty(0)]
        longest = max((stop - start for start, stop in pieces), default=1)
        size = max(1, self.budget // longest)
        for first in range(0, len(targets), size):
            part = slice(first, first + size)
            copies = []
            self.passes.pieces += sum(stop - start for start, stop in pieces[part])
            for target, (start, stop) in zip(targets[part], pieces[part], strict=True):
                copy = self.tokens[start:stop].copy()
                copy[target - start] = self.hiding[target]
                copies.append(copy)
            packed = pack(copies).to(self.model.device)
            offsets = [target - start for target, (start, _) in zip(targets[part], pieces[part], strict=True)]
            rows = packed.cu_seqlens[:-1].long() + torch.tensor(offsets, device=self.model.device)
            with torch.no_grad():
                surprise = self._surprise(self.model(packed).last[rows], targets[part])
            out.append(surprise.cpu().double().numpy())
        return np.concatenate(out)

    def _chunks(self, count: int) -> Iterator[slice]:
        size = max(1, self.budget // len(self))
        return (slice(first, min(first + size, count)) for first in range(0, count, size))

    def _read(self, targets: Sequence[int], attend: Any) -> Tensor:
        """(T,): surprise of each target, masked in a copy of its own."""
        copies = np.repeat(self.tokens[None], len(targets), 0)
        copies[np.arange(len(targets)), list(targets)] = self.hiding[list(targets)]
        packed = pack(copies).to(self.model.device)
        rows = packed.cu_seqlens[:-1].long() + torch.tensor(list(targets), device=self.model.device)
        return self._surprise(self.model(packed, attend=attend).last[rows], targets)

    def _surprise(self, hidden: Tensor, targets: Sequence[int]) -> Tensor:
        truth = torch.from_numpy(self.tokens[list(targets)]).to(hidden.device)
        logits = self.model.logits(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.logsumexp(1) - logits.gather(1, truth.unsqueeze(1)).squeeze(1)


def _kept(tokens: int, targets: Sequence[int], hidden: Sequence[Span | None]) -> Tensor | None:
    """(T, N) bool: the keys that are in sight of each copy; None if all are."""
    if all(span is None for span in hidden):
        return None
    keep = torch.ones(len(targets), tokens, dtype=torch.bool)
    for row, (target, span) in enumerate(zip(targets, hidden, strict=True)):
        if span is not None:
            keep[row, slice(*span)] = False
            keep[row, target] = True
    return keep


@dataclass(frozen=True)
class HidingAttend:
    """Exact attention in `copies` packed sequences of one length, each with keys of its own in sight (copies, N)."""

    copies: int
    keep: Tensor | None = None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, cu_seqlens: Tensor
    ) -> Tensor:
        keep = None if self.keep is None else self.keep.to(query.device)
        query, key, value = (as_rows(tensor, self.copies) for tensor in (query, key, value))
        output = attention(query, key, value, scale=scale, key_mask=keep)
        assert isinstance(output, Tensor)
        return as_packed(output)


@dataclass(frozen=True)
class SweepingAttend:
    """Exact attention in packed copies whose backward pass adds each layer to `sums` as its gradient comes by.

    `probe`, a zero that the first layer adds, makes the outputs part of a graph without gradients of parameters.
    """

    copies: int
    sums: DeletionSums
    probe: Tensor

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, cu_seqlens: Tensor
    ) -> Tensor:
        query, key, value = (as_rows(tensor, self.copies) for tensor in (query, key, value))
        output = attention(query, key, value, scale=scale)
        assert isinstance(output, Tensor)
        if layer == 0:
            output = output + self.probe
        swept = _Sweep.apply(output, query, key, value, layer, scale, self.sums)
        assert isinstance(swept, Tensor)
        return as_packed(swept)


class _Sweep(torch.autograd.Function):
    """The identity on an attention's output, which sees the gradient; its saved tensors are those of the attention."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float,
        sums: DeletionSums,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(output, query, key, value)
        ctx.layer, ctx.scale, ctx.sums = layer, scale, sums
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        output, query, key, value = (tensor.detach() for tensor in ctx.saved_tensors)
        ctx.sums.add(AttentionCall(
            ctx.layer, f"layers.{ctx.layer}", query, key, value, output, {"scale": ctx.scale, "method": "exact"},
            output_gradient=gradient,
        ))  # fmt: skip
        return gradient, None, None, None, None, None, None


def as_rows(tensor: Tensor, copies: int) -> Tensor:
    """(1, H, copies N, D) -> (copies, H, N, D), a view."""
    return tensor.squeeze(0).unflatten(1, (copies, -1)).transpose(0, 1)


def as_packed(tensor: Tensor) -> Tensor:
    """(copies, H, N, D) -> (1, H, copies N, D)."""
    return tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0)


@contextmanager
def _recomputing(model: MaskedLM) -> Iterator[None]:
    """Hold each layer's input alone for the backward pass."""
    before = model.encoder.recompute
    model.encoder.recompute = True
    try:
        yield
    finally:
        model.encoder.recompute = before


def protein_bytes(model: MaskedLM, tokens: int, budget: int, spans: int) -> int:
    """Predicted peak growth of memory, in bytes, for one protein of `tokens` tokens and so many stretches.

    The larger of a batch of copies, and of the estimate: the input of each layer, the activations of one layer with
    what their gradients take, the sweep over a tile, and the sums of a tile's queries by stretch.
    """
    config, element = model.config, model.dtype.itemsize
    batch = batch_bytes(config, max(1, budget // tokens) * tokens, element, BatchOutputs(0, 0))
    kept = (config.layers + 1) * config.width
    layer = 10 * config.width + 2 * config.feed_forward
    shape = scan_shape(model.device.type)
    tile = min(shape.scores, config.heads * shape.rows * tokens) * 40
    sums = 4 * 8 * config.heads * shape.rows * spans
    return max(batch, tokens * element * (kept + layer) + tile + sums)
