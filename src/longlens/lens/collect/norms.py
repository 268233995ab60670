"""Attention weighted by the norms of the transformed values (Kobayashi et al. 2020, arXiv:2004.10102).

A large weight on a small value adds little to the output. With W_h the columns of the output projection for head h:

    by head    f_ij = p_ij nu_j,  nu_j = |W_h v_j|                        NormWeighted(collector)
    together   f_ij = |sum_h p_hij W_h v_hj| = sqrt(p_ij^T G_j p_ij)      JointNorm(collector)

    with longlens.watch(model, [NormWeighted(Received())]) as seen: ...

Of a watched model, each layer's values and projection are used; for `longlens.scan`, give NormWeighted(collector, nu)
or JointNorm(collector, value, projection). The vector p_ij has an entry for each head, and G_j (H, H) holds the
products (W_h v_hj) . (W_g v_gj). Each wraps a collector of sums, maxima or largest entries, which then reads f in
place of p; the rows of f do not sum to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longlens.errors import InputError, UnsupportedError
from longlens.lens.block import Block, Extent
from longlens.lens.collect.collector import Collector, State
from longlens.lens.collect.columns import Received, ReceivedMax, ReceivedMean, TopQueries
from longlens.lens.collect.maps import Cells, DistanceHistogram, Pooled
from longlens.lens.collect.rows import Largest, Mass, TopKeys
from longlens.lens.statistic import Statistic
from longlens.ops.inputs import wide_dtype
from longlens.ops.observe import AttentionCall
from longlens.ops.tiles.index import take

# collectors that do not need rows of sum 1
WRAPPABLE = (Received, ReceivedMean, ReceivedMax, TopQueries, TopKeys, Largest, Mass, Pooled, Cells, DistanceHistogram)
# pairs x heads whose products are in memory at a time
PAIRS = 2**19


def value_norms(value: Tensor, projection: Tensor | None = None) -> Tensor:
    """nu (B, H, N) = |W_h v_j| of values (B, Hkv, N, Dv), in at least float32.

    `projection` (d, H Dv) is the weight of the linear layer after attention (heads in order along its columns), as
    `nn.Linear` holds it; |v_j| where None.

    Raises:
        InputError: a projection that does not fit.
    """
    wide = value.to(wide_dtype(value.dtype))
    if projection is None:
        return wide.norm(dim=-1)
    own = _by_head(projection, value).to(wide)
    # |W v|^2 = v^T (W^T W) v needs no vector of width d
    gram = own.transpose(1, 2) @ own
    spread = wide.repeat_interleave(len(own) // value.shape[1], 1)
    return ((spread @ gram) * spread).sum(-1).clamp(min=0).sqrt()


@dataclass(frozen=True, eq=False)
class NormWeighted(Collector):
    """`collector` of p_ij nu_j, for `norms` nu (B, H, Nk) of `value_norms`; its name gets "_norm".

    Where `norms` is None, they are made of the values and the projection of each layer of a watched model.
    """

    collector: Collector
    norms: Tensor | None = None

    def __post_init__(self) -> None:
        _check_wrapped(self.collector)

    @property
    def name(self) -> str:
        return f"{self.collector.name}_norm"

    def of_call(self, call: AttentionCall) -> Collector:
        if self.norms is not None:
            return self
        return replace(self, norms=value_norms(call.value, _projection_of(call)))

    def start(self, extent: Extent) -> State[Statistic]:
        if self.norms is None:
            raise InputError(
                "expected norms outside of a watched model; give NormWeighted(collector, value_norms(value))"
            )
        if self.norms.shape != (extent.batch, extent.heads, extent.keys):
            raise InputError(
                f"expected norms {(extent.batch, extent.heads, extent.keys)} of (batch, heads, keys), got "
                f"{tuple(self.norms.shape)}"
            )
        return _NormWeighted(self, extent)


class _Named(State[Statistic]):
    """A state that passes changed blocks on to another state."""

    def __init__(self, name: str, inner: State[Statistic]) -> None:
        self.name, self.inner = name, inner

    def merge(self, other: _Named) -> None:
        self.inner.merge(other.inner)

    def result(self) -> Statistic:
        return replace(self.inner.result(), name=self.name)


class _NormWeighted(_Named):
    def __init__(self, collector: NormWeighted, extent: Extent) -> None:
        super().__init__(collector.name, collector.collector.start(extent))
        assert collector.norms is not None
        self.norms = collector.norms.flatten(0, 1).to(extent.device, extent.dtype)

    def update(self, block: Block) -> None:
        norms = take(self.norms, block.heads, block.absolute_keys()).unsqueeze(1)
        weights = block.e * norms
        if block.allowed is not None:
            # a masked key's value may be NaN: it must not count
            weights = weights.masked_fill(~block.allowed, 0.0)
        self.inner.update(_with_weights(block, weights, block.allowed))


@dataclass(frozen=True, eq=False)
class JointNorm(Collector):
    """`collector` of |sum_h p_hij W_h v_hj|, all heads together: results have one head. Its name gets "_joint_norm".

    Args:
        collector: what to collect.
        value: (B, Hkv, Nk, Dv); each layer's own, of a watched model, where None.
        projection: (d, H Dv), as `value_norms` takes it; likewise.

    Holds H^2 numbers for each key, and the weights of a tile's queries for all heads at a time.
    """

    collector: Collector
    value: Tensor | None = None
    projection: Tensor | None = None

    def __post_init__(self) -> None:
        _check_wrapped(self.collector)

    @property
    def name(self) -> str:
        return f"{self.collector.name}_joint_norm"

    def of_call(self, call: AttentionCall) -> Collector:
        if self.value is not None or self.projection is not None:
            return self
        return replace(self, value=call.value, projection=_projection_of(call))

    def start(self, extent: Extent) -> State[Statistic]:
        if self.value is None or self.projection is None:
            raise InputError("expected value and projection outside of a watched model")
        shape = (self.value.shape[0], self.projection.shape[-1] // self.value.shape[3], self.value.shape[2])
        if shape != (extent.batch, extent.heads, extent.keys):
            raise InputError(
                f"expected value and projection of (batch, heads, keys) {(extent.batch, extent.heads, extent.keys)}, "
                f"got {shape}"
            )
        return _JointNorm(self, extent)


class _JointNorm(_Named):
    def __init__(self, collector: JointNorm, extent: Extent) -> None:
        super().__init__(collector.name, collector.collector.start(replace(extent, heads=1)))
        self.extent = extent
        assert collector.value is not None
        assert collector.projection is not None
        self.gram = _grams(collector.value, collector.projection, extent)
        # weights of the heads of one batch row so far, (1, rows, keys) each, and the pairs that may attend
        self._weights: list[Tensor] = []
        self._allowed: list[Tensor] = []

    def update(self, block: Block) -> None:
        if any(isinstance(index, Tensor) and index.ndim == 2 for index in (block.rows, block.keys)):
            raise UnsupportedError(
                f"{self.name} cannot follow a method whose pairs differ by head (lsh); use a collector of NormWeighted"
            )
        heads = self.extent.heads
        for head in range(block.heads.start, block.heads.stop):
            own = slice(head - block.heads.start, head - block.heads.start + 1)
            self._weights.append(block.weights[own].clone())
            if block.allowed is not None:
                self._allowed.append(block.allowed[own])
            if head % heads == heads - 1:
                self._join(block, head // heads)

    def _join(self, block: Block, batch: int) -> None:
        """Pass on the norm over the heads of one batch row; the scan makes a tile's heads one after the other."""
        p = torch.cat(self._weights)
        # pairs of which any head attends
        allowed = torch.stack(self._allowed).any(0) if self._allowed else None
        self._weights, self._allowed = [], []
        gram = take(self.gram, slice(batch, batch + 1), block.absolute_keys())[0]
        norms = p.new_empty(1, *p.shape[1:])
        step = max(1, PAIRS // max(1, p.shape[0] * p.shape[1]))
        for start in range(0, p.shape[2], step):
            keys = slice(start, start + step)
            by_key = p[:, :, keys].permute(2, 1, 0)
            squares = (torch.bmm(by_key, gram[keys]) * by_key).sum(-1)
            norms[0, :, keys] = squares.T.clamp(min=0).sqrt()
        if allowed is not None:
            norms.masked_fill_(~allowed, 0.0)
        one = torch.ones_like(norms[..., :1])
        alone = replace(
            block, heads=slice(batch, batch + 1), inverse=one, log_total=torch.zeros_like(one), lse=one.squeeze(-1)
        )
        self.inner.update(_with_weights(alone, norms, allowed))


def _with_weights(block: Block, e: Tensor, allowed: Tensor | None) -> Block:
    """The block with exponentials `e` (heads, rows, keys); pairs that may attend still count where `e` is 0."""
    exponents = e.log2().clamp_(min=-1e20)
    if allowed is not None:
        exponents.masked_fill_(~allowed, -1e30)
    return replace(block, e=e, exponents=exponents, groups=None)


def _grams(value: Tensor, projection: Tensor, extent: Extent) -> Tensor:
    """G (B, Nk, H, H)."""
    own = _by_head(projection, value).to(extent.device, extent.dtype)
    heads = torch.arange(extent.heads, device=extent.device) // (extent.heads // value.shape[1])
    products = torch.einsum("hdx,gdy->hgxy", own, own)
    grams = torch.empty(extent.batch, extent.keys, extent.heads, extent.heads, dtype=extent.dtype, device=extent.device)
    step = max(1, PAIRS // (extent.heads * value.shape[3]))
    for start in range(0, extent.keys, step):
        rows = slice(start, start + step)
        part = value[:, heads, rows].to(extent.dtype)
        for first in range(extent.heads):
            grams[:, rows, first] = torch.einsum("bnx,gxy,bgny->bng", part[:, first], products[first], part)
    return grams


def _by_head(projection: Tensor, value: Tensor) -> Tensor:
    """(d, H Dv) -> (H, d, Dv)."""
    if projection.ndim != 2 or projection.shape[1] % (value.shape[1] * value.shape[3]):
        raise InputError(
            f"expected a projection (d, heads x {value.shape[3]}) for values {tuple(value.shape)}, got "
            f"{tuple(projection.shape)}"
        )
    return projection.unflatten(1, (-1, value.shape[3])).permute(1, 0, 2)


def _projection_of(call: AttentionCall) -> Tensor:
    if call.projection is None:
        raise InputError(
            f"layer {call.layer} ({call.name}): expected to know the linear layer that follows this attention, found "
            "none of the usual names; call longlens.scan with NormWeighted(collector, value_norms(value, weight))"
        )
    return call.projection.detach()


def _check_wrapped(collector: Collector) -> None:
    if not isinstance(collector, WRAPPABLE):
        names = ", ".join(kind.__name__ for kind in WRAPPABLE)
        raise InputError(f"expected one of {names}, got {type(collector).__name__}, which needs rows that sum to 1")
