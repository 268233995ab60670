"""What tokens of the last layer draw on across all layers, without any N x N matrix.

Layer l passes on T_l, and R = T_L ... T_1 says how much of input token j is in output token i:

    rollout               T_l = (1 - a) mean_h A_lh + a I             (Abnar & Zuidema 2020, arXiv:2005.00928; a = 0.5)
    gradient x attention  T_l = I + mean_h relu(dY/dA_lh * A_lh)      (Chefer et al. 2021, arXiv:2103.15679, eq. 5, 6)

A_lh are the weights of head h, and dY/dA_ij = dY/do_i . v_j for the attention's output o. Neither R nor any A is made:
rows of R are x <- T_l^T x from the last layer down, columns x <- T_l x from the first up, and cells are columns of
blocks, summed over rows. Each step is one pass of the scan, with x (N, C): C rows, columns or blocks at once.

    with longlens.record(model) as calls:
        model(**inputs)
    rollout(calls, queries=[5])                                # Weights (B, 1, 1, N)

The model may be one of longlens or of transformers (BERT, GPT-2, ViT, ...). All attention calls given here must be
self-attention over the same tokens: of a model with an encoder and a decoder, give the calls of one of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from longlens.errors import InputError
from longlens.lens.block import Block, Extent
from longlens.lens.calls import scan_call
from longlens.lens.collect.collector import Collector, State
from longlens.lens.results import PooledMap, Weights
from longlens.ops.inputs import wide_dtype
from longlens.ops.observe import AttentionCall, ForwardObserver, Observer
from longlens.ops.tiles.index import add, take

# what `kind` may be of a map
KINDS = ("mean", "sum")


class CallRecorder(Observer, Sequence[AttentionCall]):
    """Keeps each layer's attention call of the last forward pass: L N d numbers. It is the sequence of these calls.

    Unless under `torch.no_grad()`, calls also hold the gradients of the attentions' outputs once `backward()` has run
    on what is to be explained; the model's own parameters need none.
    """

    needs_gradient = True

    def __init__(self) -> None:
        self._last: _RecordedForward | None = None

    def begin(self) -> ForwardObserver:
        return _RecordedForward(self)

    @property
    def calls(self) -> tuple[AttentionCall, ...]:
        """First layer to last."""
        if self._last is None:
            raise InputError("expected the model to be called inside the `with`; nothing was recorded yet")
        return tuple(call for _, call in sorted(self._last.calls.items()))

    @overload
    def __getitem__(self, index: int) -> AttentionCall: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[AttentionCall, ...]: ...
    def __getitem__(self, index: int | slice) -> AttentionCall | tuple[AttentionCall, ...]:
        return self.calls[index]

    def __len__(self) -> int:
        return len(self.calls)

    def __repr__(self) -> str:
        return f"CallRecorder({'nothing yet' if self._last is None else f'{len(self)} layers'})"


class _RecordedForward(ForwardObserver):
    def __init__(self, recorder: CallRecorder) -> None:
        self.recorder = recorder
        self.calls: dict[int, AttentionCall] = {}

    def attended(self, call: AttentionCall) -> None:
        # the model may write into what it handed over
        query, key, value = (tensor.detach().clone() for tensor in (call.query, call.key, call.value))
        kept = replace(call, query=query, key=key, value=value, output=None, lse=None)
        self.calls[call.layer] = kept
        if call.output is not None and call.output.requires_grad:
            call.output.register_hook(lambda gradient: self._keep_gradient(kept, gradient))

    def _keep_gradient(self, call: AttentionCall, gradient: Tensor) -> None:
        self.calls[call.layer] = replace(call, output_gradient=gradient.detach().clone())

    def ended(self) -> None:
        self.recorder._last = self


def rollout(
    layers: Sequence[AttentionCall],
    *,
    queries: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    residual: float = 0.5,
) -> Weights:
    """Rows (`queries`) or columns (`keys`) of the rollout R, exact: `values` (B, 1, R, N) or (B, 1, N, C).

    Args:
        layers: the calls that `longlens.record` kept, or attention calls, first to last.
        queries, keys: exactly one of the two: numbers of tokens of the last layer, or of the input.
        residual: a, the share of the residual connection, between 0 and 1.

    Each row of R sums to 1 where every token may attend to some token.

    Raises:
        InputError: layers of different lengths, tokens that do not exist, or neither or both of queries and keys.
    """
    _check_share(residual)
    return _pieces(_Mean(residual), layers, queries, keys, "rollout")


def rollout_map(
    layers: Sequence[AttentionCall], *, size: int = 256, kind: str = "mean", residual: float = 0.5
) -> PooledMap:
    """The rollout R in at most `size` x `size` cells: `values` (B, 1, R, C), `kind` "mean" over all pairs, or "sum".

    Each layer costs a pass of the scan with ceil(N / cell) columns: about two forward passes of attention at 128 cells.
    """
    _check_share(residual)
    return _cells(_Mean(residual), layers, size, kind, "rollout_map")


def relevance(
    layers: Sequence[AttentionCall], *, queries: Sequence[int] | None = None, keys: Sequence[int] | None = None
) -> Weights:
    """Rows or columns of gradient x attention, exact; arguments as `rollout`, but `layers` need output gradients.

    The identity is part of it: a token's relevance to itself is at least 1.
    """
    return _pieces(_Gradient(), layers, queries, keys, "relevance")


def relevance_map(layers: Sequence[AttentionCall], *, size: int = 256, kind: str = "mean") -> PooledMap:
    """Gradient x attention in cells; arguments as `rollout_map`."""
    return _cells(_Gradient(), layers, size, kind, "relevance_map")


# ---- one layer's step


class _Step(ABC):
    """T of a layer times x (B, N, C), or its transpose times x."""

    def apply(self, layer: AttentionCall, x: Tensor, *, transposed: bool) -> Tensor:
        """T x or T^T x: (B, N, C)."""
        carried = _Carry(x, self.weights(layer), transposed)
        scan_call(layer, [carried])
        return self.join(x, carried.sums)

    @abstractmethod
    def weights(self, layer: AttentionCall) -> _Product | None:
        """The factors of the weights, before negative products are set to 0; None where they are used as they are."""

    @abstractmethod
    def join(self, x: Tensor, passed: Tensor) -> Tensor:
        """The layer's result (B, N, C) from its input x and the attention's share, both (B, N, C)."""


@dataclass(frozen=True)
class _Mean(_Step):
    residual: float

    def weights(self, layer: AttentionCall) -> None:
        return None

    def join(self, x: Tensor, passed: Tensor) -> Tensor:
        return torch.lerp(passed, x, self.residual)


@dataclass(frozen=True)
class _Gradient(_Step):
    def weights(self, layer: AttentionCall) -> _Product:
        if layer.output_gradient is None:
            raise InputError(
                f"expected calls with output_gradient, layer {layer.layer} ({layer.name}) has none; call backward() on "
                "what is to be explained, outside of torch.no_grad() (an attention that attends in parts has none)"
            )
        groups = layer.query.shape[1] // layer.value.shape[1]
        value = layer.value.repeat_interleave(groups, 1) if groups > 1 else layer.value
        return _Product(layer.output_gradient.flatten(0, 1), value.flatten(0, 1))

    def join(self, x: Tensor, passed: Tensor) -> Tensor:
        return x + passed


class _Product:
    """dY/dA_ij = dY/do_i . v_j of the pairs of a block."""

    def __init__(self, gradient: Tensor, value: Tensor) -> None:
        self.gradient, self.value = gradient, value

    def of(self, block: Block) -> Tensor:
        """(heads, rows, keys)."""
        rows = take(self.gradient, block.heads, block.absolute_rows()).to(block.e.dtype)
        keys = take(self.value, block.heads, block.absolute_keys()).to(block.e.dtype)
        return torch.bmm(rows, keys.transpose(1, 2))


class _Carry(Collector):
    """Collects mean_h P_h x, or mean_h P_h^T x, for x (B, N, C); P = p, or relu(p * product)."""

    def __init__(self, x: Tensor, product: _Product | None, transposed: bool) -> None:
        self.x, self.product, self.transposed = x, product, transposed
        self.sums = torch.zeros_like(x)

    @property
    def name(self) -> str:
        return "carry"

    def start(self, extent: Extent) -> State[Weights]:
        return _Carried(self, extent)


class _Carried(State[Weights]):
    def __init__(self, collector: _Carry, extent: Extent) -> None:
        self.collector, self.extent = collector, extent

    def update(self, block: Block) -> None:
        collector, per_row = self.collector, self.extent.heads
        # p = weights x inverse
        weights, inverse = block.e, block.inverse
        if collector.product is not None:
            weights = collector.product.of(block).mul_(block.e).relu_()
            if block.allowed is not None:
                # a masked key's value may be NaN: it must not count
                weights.masked_fill_(~block.allowed, 0.0)
        first, last = block.heads.start, block.heads.stop
        for batch in range(first // per_row, -(-last // per_row)):
            heads = slice(max(first, batch * per_row), min(last, (batch + 1) * per_row))
            count, own = heads.stop - heads.start, slice(heads.start - first, heads.stop - first)
            rows, keys = (
                index[own] if isinstance(index, Tensor) and index.ndim == 2 else index
                for index in (block.absolute_rows(), block.absolute_keys())
            )
            source, target = (rows, keys) if collector.transposed else (keys, rows)
            x = take(collector.x[batch : batch + 1].expand(count, -1, -1), slice(None), source)
            scaled = inverse[own] / per_row
            if collector.transposed:
                part = torch.bmm(weights[own].transpose(1, 2), x * scaled)
            else:
                part = torch.bmm(weights[own], x) * scaled
            if isinstance(target, Tensor) and target.ndim == 2:
                for head in range(count):
                    add(collector.sums, slice(batch, batch + 1), target[head], part[head : head + 1])
            else:
                add(collector.sums, slice(batch, batch + 1), target, part.sum(0, keepdim=True))

    def merge(self, other: _Carried) -> None:
        self.collector.sums += other.collector.sums

    def result(self) -> Weights:
        values = self.collector.sums.unsqueeze(1)
        return Weights("carry", values, torch.arange(values.shape[2]), torch.arange(values.shape[3]))


# ---- all layers


def _pieces(
    step: _Step, layers: Sequence[AttentionCall], queries: Sequence[int] | None, keys: Sequence[int] | None, name: str
) -> Weights:
    batch, tokens, dtype = _check(layers)
    if (queries is None) == (keys is None):
        raise InputError("expected queries or keys, one of them; all of both would be N x N: see the maps")
    chosen = list(queries if queries is not None else keys or ())
    if not chosen or any(not 0 <= token < tokens for token in chosen):
        raise InputError(f"expected tokens in 0..{tokens - 1}, at least one, got {chosen}")
    index = torch.tensor(chosen)
    x = torch.zeros(batch, tokens, len(chosen), dtype=dtype, device=layers[0].query.device)
    x[:, index.to(x.device), torch.arange(len(chosen), device=x.device)] = 1.0
    every_token = torch.arange(tokens)
    with torch.no_grad():
        if queries is not None:
            for layer in reversed(layers):
                x = step.apply(layer, x, transposed=True)
            return Weights(name, x.transpose(1, 2).unsqueeze(1), index, every_token)
        for layer in layers:
            x = step.apply(layer, x, transposed=False)
    return Weights(name, x.unsqueeze(1), every_token, index)


def _cells(step: _Step, layers: Sequence[AttentionCall], size: int, kind: str, name: str) -> PooledMap:
    batch, tokens, dtype = _check(layers)
    if size < 1 or kind not in KINDS:
        raise InputError(f"expected size >= 1 and kind one of {KINDS}, got {size} and {kind!r}")
    width = -(-tokens // size)
    device = layers[0].query.device
    cell = torch.arange(tokens, device=device) // width
    count = int(cell[-1]) + 1
    member = (cell.unsqueeze(1) == torch.arange(count, device=device)).to(dtype)
    x = member.expand(batch, -1, -1)
    with torch.no_grad():
        for layer in layers:
            x = step.apply(layer, x, transposed=False)
        values = member.T @ x
    if kind == "mean":
        sizes = member.sum(0)
        values = values / (sizes.unsqueeze(1) * sizes)
    edges = torch.arange(count + 1).mul(width).clamp(max=tokens)
    return PooledMap(name, values.unsqueeze(1), edges, edges, kind)


def _check(layers: Sequence[AttentionCall]) -> tuple[int, int, torch.dtype]:
    """Batch, tokens and the dtype of sums."""
    shapes = {(layer.query.shape[0], layer.query.shape[2], layer.key.shape[2]) for layer in layers}
    if len(shapes) != 1 or any(queries != keys for _, queries, keys in shapes):
        raise InputError(
            "expected at least one layer, all of self-attention over the same tokens, got (batch, queries, keys) "
            f"{sorted(shapes)}; of a model with several kinds of attention, give the calls of one kind"
        )
    batch, tokens, _ = next(iter(shapes))
    if not tokens:
        raise InputError("expected at least one token, got none")
    return batch, tokens, wide_dtype(layers[0].query.dtype)


def _check_share(residual: float) -> None:
    if not 0 <= residual <= 1:
        raise InputError(f"expected a residual share in 0..1, got {residual}")
