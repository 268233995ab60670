"""What tokens of the last layer draw on across all layers, without any N x N matrix.

Layer l passes on T_l, and R = T_L ... T_1 says how much of input token j is in output token i:

    rollout               T_l = (1 - a) mean_h A_lh + a I             (Abnar & Zuidema 2020, arXiv:2005.00928; a = 0.5)
    gradient x attention  T_l = I + mean_h relu(dY/dA_lh * A_lh)      (Chefer et al. 2021, arXiv:2103.15679, eq. 5, 6)

A_lh are the weights of head h, and dY/dA_ij = dY/do_i . v_j for the attention's output o. Neither R nor any A is made:
rows of R are x <- T_l^T x from the last layer down, columns x <- T_l x from the first up, and cells are columns of
blocks, summed over rows. Each step is one walk of the scan, with x (N, C): C rows, columns or blocks at once.

    recorder = Recorder()
    model(packed, attend=recorder)
    rollout(recorder.layers, queries=[5])                      # Weights (B, 1, 1, N)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from longlens.errors import InputError
from longlens.lens.block import Block, Extent
from longlens.lens.collect.collector import Collector, State
from longlens.lens.results import PooledMap, Weights
from longlens.lens.scan import scan
from longlens.ops.attention import attention
from longlens.ops.method import Method
from longlens.ops.tiles.index import add, take

# what `kind` may be of a map
KINDS = ("mean", "sum")


@dataclass(frozen=True)
class Attended:
    """One layer's self-attention: `query` (B, H, N, D) and `key` (B, Hkv, N, D) after any rotation, and `settings`, the
    keywords of `scan` (scale, masks, method). Gradient x attention also needs `value` (B, Hkv, N, Dv) and
    `output_gradient` (B, H, N, Dv), the gradient of what is explained with respect to the attention's output."""

    query: Tensor
    key: Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)
    value: Tensor | None = None
    output_gradient: Tensor | None = None


class Recorder:
    """Attention for our models (`attend=`) that keeps each layer's queries, keys and values: L N d numbers.

    Unless under `torch.no_grad()`, `layers` also holds the gradients of the attentions' outputs once `backward()` has
    run on what is to be explained; the model's own parameters need none.
    """

    def __init__(self, method: Method | str = "exact") -> None:
        self.method = method
        self._layers: dict[int, Attended] = {}

    @property
    def layers(self) -> tuple[Attended, ...]:
        """The layers of the last call, first to last."""
        return tuple(layer for _, layer in sorted(self._layers.items()))

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, cu_seqlens: Tensor
    ) -> Tensor:
        settings: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "method": self.method}
        output = attention(query, key, value, **settings)
        assert isinstance(output, Tensor)
        # the model may write into what it handed over
        kept = [tensor.detach().clone() for tensor in (query, key, value)]
        self._layers[layer] = Attended(kept[0], kept[1], settings, kept[2])
        if torch.is_grad_enabled():
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(lambda gradient: self._keep_gradient(layer, gradient))
        return output

    def _keep_gradient(self, layer: int, gradient: Tensor) -> None:
        self._layers[layer] = replace(self._layers[layer], output_gradient=gradient.detach().clone())


def rollout(
    layers: Sequence[Attended],
    *,
    queries: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    residual: float = 0.5,
) -> Weights:
    """Rows (`queries`) or columns (`keys`) of the rollout R, exact: `values` (B, 1, R, N) or (B, 1, N, C).

    Args:
        layers: first to last.
        queries, keys: one of the two: tokens of the last layer, or of the input.
        residual: a, the share of a token that passes by the attention.

    Each row of R sums to 1, where every token may attend to something.

    Raises:
        InputError: layers of different lengths, tokens that do not exist, or neither or both of queries and keys.
    """
    _check_share(residual)
    return _pieces(_Mean(residual), layers, queries, keys, "rollout")


def rollout_map(layers: Sequence[Attended], *, size: int = 256, kind: str = "mean", residual: float = 0.5) -> PooledMap:
    """The rollout R in at most `size` x `size` cells: `values` (B, 1, R, C), `kind` "mean" over all pairs, or "sum".

    Costs, for each layer, a walk with ceil(N / cell) columns: about twice a forward pass of attention at 128 cells.
    """
    _check_share(residual)
    return _cells(_Mean(residual), layers, size, kind, "rollout_map")


def relevance(
    layers: Sequence[Attended], *, queries: Sequence[int] | None = None, keys: Sequence[int] | None = None
) -> Weights:
    """Rows or columns of gradient x attention, exact; arguments as `rollout`, whose layers need output gradients.

    The identity is part of it: what stands at a token itself is at least 1.
    """
    return _pieces(_Gradient(), layers, queries, keys, "relevance")


def relevance_map(layers: Sequence[Attended], *, size: int = 256, kind: str = "mean") -> PooledMap:
    """Gradient x attention in cells; arguments as `rollout_map`."""
    return _cells(_Gradient(), layers, size, kind, "relevance_map")


# ---- one layer's step


class _Step(ABC):
    """T of a layer times x (B, N, C), or its transpose times x."""

    def apply(self, layer: Attended, x: Tensor, *, transposed: bool) -> Tensor:
        """T x or T^T x: (B, N, C)."""
        carried = _Carry(x, self.weights(layer), transposed)
        scan(layer.query, layer.key, collect=[carried], **layer.settings)
        return self.join(x, carried.sums)

    @abstractmethod
    def weights(self, layer: Attended) -> _Product | None:
        """What each weight is multiplied with before negative ones are dropped; None where they stand as they are."""

    @abstractmethod
    def join(self, x: Tensor, passed: Tensor) -> Tensor:
        """What leaves the layer, of what entered and what attention passed on."""


@dataclass(frozen=True)
class _Mean(_Step):
    residual: float

    def weights(self, layer: Attended) -> None:
        return None

    def join(self, x: Tensor, passed: Tensor) -> Tensor:
        return torch.lerp(passed, x, self.residual)


@dataclass(frozen=True)
class _Gradient(_Step):
    def weights(self, layer: Attended) -> _Product:
        if layer.value is None or layer.output_gradient is None:
            raise InputError(
                "expected layers with value and output_gradient; with a Recorder, call backward() on what is to be "
                "explained (outside of torch.no_grad())"
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
        """(lanes, rows, keys)."""
        rows = take(self.gradient, block.lanes, block.absolute_rows()).to(block.e.dtype)
        keys = take(self.value, block.lanes, block.absolute_keys()).to(block.e.dtype)
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
        given, heads = self.collector, self.extent.heads
        # p = weights x inverse
        weights, inverse = block.e, block.inverse
        if given.product is not None:
            weights = given.product.of(block).mul_(block.e).relu_()
            if block.allowed is not None:
                # a masked value may be anything: it must not count
                weights.masked_fill_(~block.allowed, 0.0)
        first, last = block.lanes.start, block.lanes.stop
        for batch in range(first // heads, -(-last // heads)):
            lanes = slice(max(first, batch * heads), min(last, (batch + 1) * heads))
            count, own = lanes.stop - lanes.start, slice(lanes.start - first, lanes.stop - first)
            rows, keys = (
                index[own] if isinstance(index, Tensor) and index.ndim == 2 else index
                for index in (block.absolute_rows(), block.absolute_keys())
            )
            source, target = (rows, keys) if given.transposed else (keys, rows)
            x = take(given.x[batch : batch + 1].expand(count, -1, -1), slice(None), source)
            scaled = inverse[own] / heads
            if given.transposed:
                part = torch.bmm(weights[own].transpose(1, 2), x * scaled)
            else:
                part = torch.bmm(weights[own], x) * scaled
            if isinstance(target, Tensor) and target.ndim == 2:
                for lane in range(count):
                    add(given.sums, slice(batch, batch + 1), target[lane], part[lane : lane + 1])
            else:
                add(given.sums, slice(batch, batch + 1), target, part.sum(0, keepdim=True))

    def merge(self, other: _Carried) -> None:
        self.collector.sums += other.collector.sums

    def result(self) -> Weights:
        values = self.collector.sums.unsqueeze(1)
        return Weights("carry", values, torch.arange(values.shape[2]), torch.arange(values.shape[3]))


# ---- all layers


def _pieces(
    step: _Step, layers: Sequence[Attended], queries: Sequence[int] | None, keys: Sequence[int] | None, name: str
) -> Weights:
    batch, tokens, dtype = _check(layers)
    if (queries is None) == (keys is None):
        raise InputError("expected queries or keys, one of them; all of both would be N x N: see the maps")
    wanted = list(queries if queries is not None else keys or ())
    if not wanted or any(not 0 <= token < tokens for token in wanted):
        raise InputError(f"expected tokens in 0..{tokens - 1}, at least one, got {wanted}")
    index = torch.tensor(wanted)
    x = torch.zeros(batch, tokens, len(wanted), dtype=dtype, device=layers[0].query.device)
    x[:, index.to(x.device), torch.arange(len(wanted), device=x.device)] = 1.0
    everyone = torch.arange(tokens)
    with torch.no_grad():
        if queries is not None:
            for layer in reversed(layers):
                x = step.apply(layer, x, transposed=True)
            return Weights(name, x.transpose(1, 2).unsqueeze(1), index, everyone)
        for layer in layers:
            x = step.apply(layer, x, transposed=False)
    return Weights(name, x.unsqueeze(1), everyone, index)


def _cells(step: _Step, layers: Sequence[Attended], size: int, kind: str, name: str) -> PooledMap:
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


def _check(layers: Sequence[Attended]) -> tuple[int, int, torch.dtype]:
    """Batch, tokens and the dtype of sums."""
    shapes = {(layer.query.shape[0], layer.query.shape[2], layer.key.shape[2]) for layer in layers}
    if len(shapes) != 1 or any(queries != keys for _, queries, keys in shapes):
        raise InputError(
            "expected at least one layer, all of self-attention over the same tokens, got (batch, queries, keys) "
            f"{sorted(shapes)}"
        )
    batch, tokens, _ = next(iter(shapes))
    if not tokens:
        raise InputError("expected at least one token, got none")
    return batch, tokens, torch.promote_types(layers[0].query.dtype, torch.float32)


def _check_share(residual: float) -> None:
    if not 0 <= residual <= 1:
        raise InputError(f"expected a residual share in 0..1, got {residual}")
