"""Contact maps from attention, without layers x heads x N x N (Rao et al. 2020, doi 10.1101/2020.12.15.422761; ESM-2).

The contact head is a logistic regression over channels c = (layer, head). With B_c the (T, T) weights of residues on
residues (start and end tokens take part in the softmax and are then left out):

    S_c = B_c + B_c^T                                            symmetrised
    F_c = S_c - (row sums)_i (column sums)_j / total             average product correction (Dunn et al. 2008)
    p_ij = sigmoid(b + sum_c w_c F_c,ij)

By linearity, with r_c = (row sums + column sums of B_c), which are the row sums of S_c, and t_c = sum_i r_c,i:

    sum_c w_c F_c = W + W^T - R diag(w / t) R^T,   W = sum_c w_c B_c,   R = [r_c] (T, C)

so all channels share one map, and the correction needs T x C numbers. `WholeMap` keeps that map: 4 T^2 bytes. `KeptMap`
keeps queries, keys and log-sum-exps instead and makes any stretch of rows again: memory linear in T. A channel whose
weight is 0 costs nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from longlens.ops.attention import attention
from longlens.ops.observe import AttentionCall, ForwardObserver, Observer

LN2 = math.log(2.0)
# weights made at a time, over heads: they stay in the second-level cache
WEIGHTS = 2**19
ROWS = 128
# rows of the finished map handed out at a time
STRETCH = 256


@dataclass(frozen=True)
class Regression:
    """`weight` (L, H) and `bias` of the contact head, on the CPU."""

    weight: Tensor
    bias: float


@dataclass(frozen=True)
class Rows:
    """Probabilities of residues first..first + m with residues first..T, (m, T - first): the upper triangle's rows."""

    first: int
    probabilities: Tensor


class Layers(ABC):
    """Takes every layer of one sequence, in order."""

    def __init__(self, residues: int, regression: Regression) -> None:
        self.residues, self.regression = residues, regression
        self._sums: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, layer: int, query: Tensor, key: Tensor, lse: Tensor, scale: float) -> None:
        """Take in a layer: query, key (H, T + 2, D) after rotation, and the log-sum-exp (H, T + 2), in float32."""
        weight = self.regression.weight[layer].to(query.device)
        # positive weights first: their part is then one sum and the rest another
        used = torch.argsort(weight, descending=True)
        used = used[weight[used] != 0]
        if len(used):
            self._add(_Channels.of(query[used], key[used], lse[used], scale, weight[used]))

    @abstractmethod
    def _add(self, channels: _Channels) -> None:
        """Take in the heads of a layer that have a weight."""

    def _keep_sums(self, channels: _Channels, sums: Tensor) -> None:
        self._sums.append(sums.float())
        self._weights.append(channels.weight)

    def _correction(self) -> tuple[Tensor, Tensor]:
        """R (T, C) and R diag(w / t)."""
        if not self._sums:
            none = torch.zeros(self.residues, 0)
            return none, none
        sums = torch.cat(self._sums).double()
        total = sums.sum(1)
        # a head that puts nothing at all on residues has a map of zeros
        factor = torch.where(total > 0, torch.cat(self._weights).double() / total, 0.0)
        return sums.T.float().contiguous(), (sums * factor.unsqueeze(1)).T.float().contiguous()


class ContactMap(Layers):
    """The map of one sequence: give it every layer, then take its rows."""

    @abstractmethod
    def rows(self) -> Iterator[Rows]:
        """The probabilities, `STRETCH` rows of the upper triangle at a time, first to last; float32."""


class WholeMap(ContactMap):
    """Keeps the map itself, 4 T^2 bytes."""

    def __init__(self, residues: int, regression: Regression, device: torch.device) -> None:
        super().__init__(residues, regression)
        self._map = torch.zeros(residues, residues, device=device)
        self._finished = False

    def _add(self, channels: _Channels) -> None:
        # rows of W are complete before the next layer's are begun, so that they stay in the cache
        self._keep_sums(channels, channels.walk(self._map))

    def finish(self) -> Tensor:
        """Probabilities (T, T), float32. The map is the caller's from then on."""
        if not self._finished:
            self._finished = True
            left, right = self._correction()
            for i in _stretches(self.residues):
                for j in _stretches(self.residues):
                    if j.start >= i.start:
                        logits = self._map[i, j] + self._map[j, i].T
                        logits -= left[i].to(logits) @ right[j].to(logits).T
                        if i == j:
                            _mirror(logits)
                        probabilities = logits.add_(self.regression.bias).sigmoid_()
                        self._map[i, j] = probabilities
                        self._map[j, i] = probabilities.T
        return self._map

    def rows(self) -> Iterator[Rows]:
        probabilities = self.finish()
        for i in _stretches(self.residues):
            yield Rows(i.start, probabilities[i, i.start :])


class KeptMap(ContactMap):
    """Keeps queries, keys and log-sum-exps: T (2 d + 4 C) numbers; each row is made when it is asked for."""

    def __init__(self, residues: int, regression: Regression) -> None:
        super().__init__(residues, regression)
        self._kept: list[_Channels] = []

    def _add(self, channels: _Channels) -> None:
        self._keep_sums(channels, channels.walk(None))
        self._kept.append(channels)

    def rows(self) -> Iterator[Rows]:
        left, right = self._correction()
        for i in _stretches(self.residues):
            device = self._kept[0].query.device if self._kept else left.device
            logits = torch.zeros(i.stop - i.start, self.residues - i.start, device=device)
            for channels in self._kept:
                channels.add_both(logits, i)
            logits -= left[i] @ right[i.start :].T
            _mirror(logits[:, : len(logits)])
            yield Rows(i.start, logits.add_(self.regression.bias).sigmoid_())


class PairFeatures(Layers):
    """The corrected attention F_c of every channel at chosen `pairs` (M, 2): what a head is fitted to."""

    def __init__(self, residues: int, layers: int, heads: int, pairs: Tensor) -> None:
        super().__init__(residues, Regression(torch.ones(layers, heads), 0.0))
        self.pairs = pairs
        self._features: list[Tensor] = []

    def _add(self, channels: _Channels) -> None:
        i, j = self.pairs.T
        queries, keys = channels.queries(slice(0, self.residues)), channels.keys(slice(0, self.residues))
        both = sum((queries[:, a] * keys[:, b]).sum(2).exp2() for a, b in ((i, j), (j, i)))
        sums = channels.walk(None)
        total = sums.sum(1, keepdim=True)
        expected = torch.where(total > 0, sums[:, i] * sums[:, j] / total, 0.0)
        self._features.append((both - expected).float().T)

    def features(self) -> Tensor:
        """(M, L H), layer-major."""
        return torch.cat(self._features, 1)


@dataclass(frozen=True)
class _Channels:
    """Heads of one layer, those of positive weight first: `query` (h, T + 2, D), `key` alike, `lse` (h, T + 2).

    |w| p_ij = exp(scale q_i . k_j - lse_i + log |w|): one matrix product of widened queries
    [scale q, log |w| - lse] / log 2 and keys [k, 1], and one power of 2, which is several times quicker than one of e.
    """

    query: Tensor
    key: Tensor
    lse: Tensor
    scale: float
    weight: Tensor
    positive: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, lse: Tensor, scale: float, weight: Tensor) -> _Channels:
        return cls(query, key, lse, scale, weight.float(), int((weight > 0).sum()))

    def queries(self, rows: slice) -> Tensor:
        """[scale q, log |w| - lse] / log 2 of residues, (h, m, D + 1)."""
        place = slice(rows.start + 1, rows.stop + 1)
        shift = self.weight.abs().log2().unsqueeze(1) - self.lse[:, place] / LN2
        return torch.cat([self.query[:, place].float() * (self.scale / LN2), shift.unsqueeze(2)], 2)

    def keys(self, rows: slice) -> Tensor:
        """[k, 1] of residues, (h, m, D + 1)."""
        part = self.key[:, rows.start + 1 : rows.stop + 1].float()
        return torch.cat([part, part.new_ones(*part.shape[:2], 1)], 2)

    @property
    def residues(self) -> int:
        return self.query.shape[1] - 2

    def walk(self, into: Tensor | None) -> Tensor:
        """Row sums + column sums of each head's weights, (h, T); adds w p to `into` (T, T)."""
        heads, residues = len(self.weight), self.residues
        sums = torch.zeros(heads, residues, dtype=torch.float64, device=self.query.device)
        keys = self.keys(slice(0, residues)).transpose(1, 2)
        scratch = _Scratch(self.query.device)
        for rows in _stretches(residues, ROWS):
            queries = self.queries(rows)
            for columns in _stretches(residues, _width(heads, rows)):
                e = scratch.weights(queries, keys[:, :, columns])
                sums[:, rows] += e.sum(2)
                sums[:, columns] += e.sum(1)
                if into is not None:
                    self._join(into[rows, columns], e)
        return sums / self.weight.abs().unsqueeze(1)

    def add_both(self, into: Tensor, rows: slice) -> None:
        """Add w (p_ij + p_ji) to `into` (m, T - first), for residues i of `rows` and j from rows.start on."""
        heads = len(self.weight)
        queries, keys = self.queries(rows), self.keys(rows)
        scratch = _Scratch(self.query.device)
        for columns in _stretches(into.shape[1], _width(heads, rows)):
            place = slice(rows.start + columns.start, rows.start + columns.stop)
            part = into[:, columns]
            self._join(part, scratch.weights(queries, self.keys(place).transpose(1, 2)))
            self._join(part, scratch.weights(keys, self.queries(place).transpose(1, 2)))

    def _join(self, into: Tensor, e: Tensor) -> None:
        if self.positive:
            into += e[: self.positive].sum(0)
        if self.positive < len(e):
            into -= e[self.positive :].sum(0)


def _mirror(square: Tensor) -> None:
    """Make a square symmetric, in place: rounding alone tells its halves apart."""
    square.copy_(square.triu() + square.triu(1).T)


class _Scratch:
    """One stretch of memory for the weights of a tile."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, device=device)

    def weights(self, left: Tensor, right: Tensor) -> Tensor:
        """2 to the power of left right: (h, m, n)."""
        shape = (len(left), left.shape[1], right.shape[2])
        count = shape[0] * shape[1] * shape[2]
        if self._memory.numel() < count:
            self._memory = self._memory.new_empty(count)
        return torch.bmm(left, right, out=self._memory[:count].view(shape)).exp2_()


def _width(heads: int, rows: slice) -> int:
    return max(64, WEIGHTS // (heads * (rows.stop - rows.start)))


def _stretches(count: int, step: int = STRETCH) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


# ---- a model's layers, one after the other


class ContactObserver(Observer):
    """Hands each layer of packed sequences, or of padded batch rows, to their maps.

    `maps` stand in the order of the sequences. Padded rows are given as `lengths`, their tokens from the left: what
    attends to more than a row's own tokens is left out. Only passes of the thread that made it are seen.
    """

    needs_lse = True

    def __init__(self, maps: Sequence[Layers], lengths: Sequence[int] | None = None) -> None:
        self.maps, self.lengths = maps, lengths
        self._thread = get_ident()

    def begin(self) -> ForwardObserver:
        # two threads may predict with one model at a time
        return _ContactForward(self) if get_ident() == self._thread else ForwardObserver()


class _ContactForward(ForwardObserver):
    def __init__(self, observer: ContactObserver) -> None:
        self.observer = observer

    def attended(self, call: AttentionCall) -> None:
        scale = call.settings.get("scale")
        scale = call.query.shape[3] ** -0.5 if scale is None else scale
        maps = self.observer.maps
        if self.observer.lengths is not None:
            for row, (contact_map, length) in enumerate(zip(maps, self.observer.lengths, strict=True)):
                query, key = call.query[row : row + 1, :, :length], call.key[row : row + 1, :, :length]
                contact_map.add(call.layer, query[0], key[0], float_lse(query, key, scale=scale)[0], scale)
            return
        packed, lse = call.settings["cu_seqlens"], call.lse
        if lse is None or call.query.dtype != torch.float32:
            lse = float_lse(call.query, call.key, scale=scale, cu_seqlens=packed)
        for contact_map, (start, stop) in zip(maps, pairwise(packed.tolist()), strict=True):
            place = slice(start, stop)
            contact_map.add(call.layer, call.query[0, :, place], call.key[0, :, place], lse[0, :, place], scale)


def float_lse(query: Tensor, key: Tensor, **settings: Any) -> Tensor:
    """Log-sum-exp of scores in float32, (B, H, N): a half-precision kernel's own would not make rows sum to 1."""
    wide = key.float()
    return attention(query.float(), wide, wide[..., :1], return_lse=True, **settings)[1]


def kept_bytes(layers: int, heads: int, head_width: int, element: int, residues: int) -> int:
    """What a `KeptMap` holds, in bytes: queries and keys, log-sum-exps, sums twice in double and once in float32."""
    tokens = residues + 2
    return layers * heads * tokens * (2 * head_width * element + 4 + 4 + 8 + 8 + 4 + 4) + STRETCH * tokens * 4 * 3


def whole_bytes(layers: int, heads: int, residues: int) -> int:
    """What a `WholeMap` holds, in bytes."""
    return 4 * residues * residues + layers * heads * residues * 28
