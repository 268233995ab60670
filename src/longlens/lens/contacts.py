"""Contact maps from attention, without layers x heads x N x N (Rao et al. 2020, doi 10.1101/2020.12.15.422761; ESM-2).

The contact head is a logistic regression over channels c = (layer, head). With B_c the (T, T) weights of residues on
residues (start and end tokens take part in the softmax and are then left out):

    S_c = B_c + B_c^T                                            symmetrised
    F_c = S_c - (row sums)_i (column sums)_j / total             average product correction (Dunn et al. 2008)
    p_ij = sigmoid(b + sum_c w_c F_c,ij)

By linearity, with r_c = (row sums + column sums of B_c), which are the row sums of S_c, and t_c = sum_i r_c,i:

    sum_c w_c F_c = W + W^T - R diag(w / t) R^T,   W = sum_c w_c B_c,   R = [r_c] (T, C)

so all channels share one map, and the correction needs T x C numbers. `WholeMap` keeps that map: 4 T^2 bytes. `KeptMap`
keeps queries, keys and log-sum-exps instead, and makes any range of rows from them: memory linear in T. A channel whose
weight is 0 costs nothing. The weights of a tile are made by `longlens.ops.tiles.weights`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from longlens.errors import UnsupportedError
from longlens.ops.attention import attention
from longlens.ops.biases import Bias
from longlens.ops.bounds import bounds_of
from longlens.ops.observe import AttentionCall, ForwardObserver, Observer
from longlens.ops.registry import resolve_method
from longlens.ops.tiles.scratch import Scratch
from longlens.ops.tiles.weights import KnownWeights, pair_weights, tile_weights

# weights computed at a time, over heads, and queries among them: a tile stays in the second-level cache
WEIGHTS = 2**19
ROWS = 128
# and on an accelerator, where starting a kernel takes as long as making a million weights
MANY_WEIGHTS = 2**25
MANY_ROWS = 1024
# rows of the finished map that are returned at a time
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

    def add(
        self, layer: int, query: Tensor, key: Tensor, lse: Tensor, scale: float, before: int = 1,
        bias: Bias | None = None,
    ) -> None:  # fmt: skip
        """Take in a layer: query (H, N, D) and key (Hkv, N, D) after rotation, lse (H, N) float32, of all N tokens;
        the first residue is token `before`. `bias`: of distances, which is part of the scores."""
        # chosen on the CPU, where the weights are: an accelerator would have to be waited for
        weight = self.regression.weight[layer].float().cpu()
        # positive weights first: their part is then one sum and the rest another
        used = torch.argsort(weight, descending=True)
        used = used[weight[used] != 0]
        if len(used):
            weight = weight[used]
            positive = int((weight > 0).sum())
            shared = (used // (len(query) // len(key))).to(query.device)
            used = used.to(query.device)
            residues = slice(before, before + self.residues)
            chosen = (query[used, residues], key[shared, residues], lse[used, residues])
            known = KnownWeights(*chosen, scale, weight.abs().to(query.device), bias, used)
            self._add(_Channels(known, weight.to(query.device), positive))

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
        self._keep_sums(channels, channels.add_tiles(self._map))

    def finish(self) -> Tensor:
        """Probabilities (T, T), float32. The map is the caller's from then on."""
        if not self._finished:
            self._finished = True
            left, right = self._correction()
            step = STRETCH if self._map.device.type == "cpu" else MANY_ROWS
            for i in _ranges(self.residues, step):
                for j in _ranges(self.residues, step):
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
        for i in _ranges(self.residues):
            yield Rows(i.start, probabilities[i, i.start :])


class KeptMap(ContactMap):
    """Keeps queries, keys and log-sum-exps: T (2 d + 4 C) numbers; each row is made when it is asked for."""

    def __init__(self, residues: int, regression: Regression) -> None:
        super().__init__(residues, regression)
        self._kept: list[_Channels] = []

    def _add(self, channels: _Channels) -> None:
        self._keep_sums(channels, channels.add_tiles(None))
        self._kept.append(channels)

    def rows(self) -> Iterator[Rows]:
        left, right = self._correction()
        for i in _ranges(self.residues):
            device = self._kept[0].device if self._kept else left.device
            logits = torch.zeros(i.stop - i.start, self.residues - i.start, device=device)
            for channels in self._kept:
                channels.add_symmetrised(logits, i)
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
        everything = slice(0, self.residues)
        queries, keys = channels.known.rows(everything), channels.known.columns(everything)
        both = pair_weights(queries[:, i], keys[:, j], channels.known.pair_bits(i, j))
        both += pair_weights(queries[:, j], keys[:, i], channels.known.pair_bits(j, i))
        sums = channels.add_tiles(None)
        total = sums.sum(1, keepdim=True)
        expected = torch.where(total > 0, sums[:, i] * sums[:, j] / total, 0.0)
        self._features.append((both - expected).float().T)

    def features(self) -> Tensor:
        """(M, L H), layer-major."""
        return torch.cat(self._features, 1)


@dataclass(frozen=True)
class _Channels:
    """The heads of one layer that have a weight w, those of positive weight first.

    `known` makes |w| p of residues on residues: query and key (h, T, D), lse (h, T), factor |w|.
    """

    known: KnownWeights
    weight: Tensor
    positive: int

    @property
    def residues(self) -> int:
        return self.known.query.shape[1]

    @property
    def device(self) -> torch.device:
        return self.known.query.device

    def add_tiles(self, total: Tensor | None) -> Tensor:
        """Row sums + column sums of each head's weights p, (h, T) float64; adds sum_h w p to `total` (T, T)."""
        heads, residues = len(self.weight), self.residues
        sums = torch.zeros(heads, residues, dtype=torch.float64, device=self.device)
        keys = self.known.columns(slice(0, residues))
        scratch = Scratch(self.device)
        for rows in _ranges(residues, ROWS if self.device.type == "cpu" else MANY_ROWS):
            queries = self.known.rows(rows)
            for columns in _ranges(residues, _width(heads, rows, self.device)):
                weights = tile_weights(queries, keys[:, columns], scratch, self.known.bits(rows, columns))
                sums[:, rows] += weights.sum(2)
                sums[:, columns] += weights.sum(1)
                if total is not None:
                    self._add_signed(total[rows, columns], weights)
        return sums / self.weight.abs().unsqueeze(1)

    def add_symmetrised(self, total: Tensor, rows: slice) -> None:
        """Add sum_h w (p_ij + p_ji) to `total` (m, T - first), for residues i of `rows` and j from rows.start on."""
        heads = len(self.weight)
        queries, keys = self.known.rows(rows), self.known.columns(rows)
        scratch = Scratch(self.device)
        for columns in _ranges(total.shape[1], _width(heads, rows, self.device)):
            place = slice(rows.start + columns.start, rows.start + columns.stop)
            part = total[:, columns]
            ahead, back = self.known.bits(rows, place), self.known.bits(place, rows)
            self._add_signed(part, tile_weights(queries, self.known.columns(place), scratch, ahead))
            back = None if back is None else back.mT
            self._add_signed(part, tile_weights(keys, self.known.rows(place), scratch, back))

    def _add_signed(self, total: Tensor, weights: Tensor) -> None:
        """Add sum_h w p, given |w| p (h, m, n), to `total` (m, n)."""
        if self.positive:
            total += weights[: self.positive].sum(0)
        if self.positive < len(weights):
            total -= weights[self.positive :].sum(0)


def _mirror(square: Tensor) -> None:
    """Make a square symmetric, in place: rounding alone tells its halves apart."""
    square.copy_(square.triu() + square.triu(1).T)


def _width(heads: int, rows: slice, device: torch.device) -> int:
    """Keys of a tile of all heads."""
    weights = WEIGHTS if device.type == "cpu" else MANY_WEIGHTS
    return max(64, weights // (heads * (rows.stop - rows.start)))


def _ranges(count: int, step: int | None = None) -> Iterator[slice]:
    """0..count in ranges of `step`, or of `STRETCH`."""
    step = STRETCH if step is None else step
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


# ---- a model's layers, one after the other


class ContactObserver(Observer):
    """Adds each layer of packed sequences, or of padded batch rows, to their maps.

    `maps` are in the order of the sequences. For a padded batch, `lengths` are the tokens of each row, padded on the
    right; padding tokens count neither as queries nor as keys. Only forward passes of the thread that made the
    observer are seen. `before`: tokens before the first residue.
    """

    needs_lse = True

    def __init__(self, maps: Sequence[Layers], lengths: Sequence[int] | None = None, before: int = 1) -> None:
        self.maps, self.lengths, self.before = maps, lengths, before
        self._thread = get_ident()

    def begin(self) -> ForwardObserver:
        # two threads may predict with one model at a time
        return _ContactForward(self) if get_ident() == self._thread else ForwardObserver()


class _ContactForward(ForwardObserver):
    def __init__(self, observer: ContactObserver) -> None:
        self.observer = observer

    def attended(self, call: AttentionCall) -> None:
        _refuse_other_than_exact(call)
        scale = call.settings.get("scale")
        scale = call.query.shape[3] ** -0.5 if scale is None else scale
        maps, before, bias = self.observer.maps, self.observer.before, call.settings.get("bias")
        if self.observer.lengths is not None:
            for row, (contact_map, length) in enumerate(zip(maps, self.observer.lengths, strict=True)):
                query, key = call.query[row : row + 1, :, :length], call.key[row : row + 1, :, :length]
                row_lse = log_sum_exp(query, key, scale=scale, bias=bias)[0]
                contact_map.add(call.layer, query[0], key[0], row_lse, scale, before, bias)
            return
        packed, lse = call.settings["cu_seqlens"], call.lse
        if lse is None:
            lse = log_sum_exp(call.query, call.key, scale=scale, cu_seqlens=packed, bias=bias)
        for contact_map, (start, stop) in zip(maps, pairwise(bounds_of(packed)), strict=True):
            place = slice(start, stop)
            query, key = call.query[0, :, place], call.key[0, :, place]
            contact_map.add(call.layer, query, key, lse[0, :, place], scale, before, bias)


def _refuse_other_than_exact(call: AttentionCall) -> None:
    """The weights are computed from queries, keys and a bias of distances: nothing else may decide them."""
    method = resolve_method(call.settings.get("method") or "exact")
    others = ("attn_mask", "softcap", "sinks")
    wrong = [name for name in others if call.settings.get(name) is not None]
    bias = call.settings.get("bias")
    wrong += ["bias"] if bias is not None and not (isinstance(bias, Bias) and bias.by_distance) else []
    wrong += ["is_causal"] if call.settings.get("is_causal") else []
    if method.name != "exact" or wrong:
        raise UnsupportedError(
            f"contact maps need exact attention over all tokens, got {method} with {', '.join(wrong) or 'no masks'} in "
            f"layer {call.layer}"
        )


def log_sum_exp(query: Tensor, key: Tensor, **settings: Any) -> Tensor:
    """Log-sum-exp of the scores, (B, H, N), float32 (float64 for float64), of query (B, H, N, D) and key alike."""
    return attention(query, key, key[..., :1], return_lse=True, **settings)[1]


def kept_bytes(layers: int, heads: int, head_width: int, element: int, residues: int) -> int:
    """What a `KeptMap` holds, in bytes: queries and keys, log-sum-exps, sums twice in double and once in float32."""
    tokens = residues + 2
    return layers * heads * tokens * (2 * head_width * element + 4 + 4 + 8 + 8 + 4 + 4) + STRETCH * tokens * 4 * 3


def whole_bytes(layers: int, heads: int, residues: int) -> int:
    """What a `WholeMap` holds, in bytes."""
    return 4 * residues * residues + layers * heads * residues * 28


def feature_bytes(layers: int, heads: int, head_width: int, residues: int, pairs: int) -> int:
    """What `PairFeatures` holds, in bytes: features twice, and queries and keys of one layer and of its pairs."""
    return 8 * pairs * layers * heads + heads * head_width * 4 * (4 * residues + 4 * pairs)
