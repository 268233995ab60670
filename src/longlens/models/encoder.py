"""A Transformer encoder that runs packed: sequences lie end to end, without padding, in memory linear in their length.

The residual stream is (T, d) for T tokens of all sequences together; attention gets their boundaries. Attention
itself is an argument (`attend`), so that any method serves. Its calls are reported to observers
(`longlens.ops.observe`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longlens.errors import InputError
from longlens.models.linear import apply_linear, apply_linear_gelu
from longlens.models.observers import ObservedForward, Observers
from longlens.models.rotary import Rotary, rotate, rotate_in_place
from longlens.ops.attention import attention
from longlens.ops.bounds import bounds_of, know_bounds
from longlens.ops.method import Method
from longlens.ops.observe import AttentionCall, Observer

# tokens whose feed-forward activations are held at a time, where no gradient is wanted
CHUNK = 1024


class Attend(Protocol):
    """Attention as a model calls it: query, key, value (1, H, T, D) of packed sequences -> (1, H, T, D)."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, cu_seqlens: Tensor
    ) -> Tensor:
        """Attend within each sequence; `layer` counts from 0."""


@dataclass(frozen=True)
class AttendWith:
    """`longlens.attention` by one method in every layer."""

    method: Method | str = "exact"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, cu_seqlens: Tensor
    ) -> Tensor:
        output = attention(query, key, value, scale=scale, cu_seqlens=cu_seqlens, method=self.method)
        assert isinstance(output, Tensor)
        return output

    def with_lse(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, cu_seqlens: Tensor) -> list[Tensor]:
        """Output and log-sum-exp (1, H, T)."""
        return [*attention(query, key, value, scale=scale, cu_seqlens=cu_seqlens, method=self.method, return_lse=True)]


def attend_with(method: Method | str = "exact") -> Attend:
    """`longlens.attention` by one method in every layer."""
    return AttendWith(method)


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder.

    `pre_norm`: LayerNorm before each block and at the end (ESM-2); after each block and after the embedding otherwise
    (BERT). `positions`: "rotary", or "absolute" up to `max_length`. `token_dropout`: ESM-2's rescaling by the share of
    masked tokens.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    feed_forward: int
    norm_eps: float = 1e-5
    pre_norm: bool = True
    positions: str = "rotary"
    max_length: int | None = None
    token_dropout: bool = True
    mask_token: int = 32

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise InputError(f"expected the width to be a multiple of the heads, got {self.width} and {self.heads}")
        if self.positions not in ("rotary", "absolute"):
            raise InputError(f"expected positions 'rotary' or 'absolute', got {self.positions!r}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Packed(NamedTuple):
    """Sequences end to end: `tokens` (T,) int64, `cu_seqlens` (S + 1,) int32."""

    tokens: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device | str) -> Packed:
        bounds = bounds_of(self.cu_seqlens)
        # a tensor made in inference mode does not tell whether it was written to, and would be read in every layer
        with torch.inference_mode(False):
            moved = Packed(self.tokens.to(device), self.cu_seqlens.to(device))
        know_bounds(moved.cu_seqlens, bounds)
        return moved


def pack(sequences: Iterable[NDArray[np.int64]]) -> Packed:
    """Token numbers of sequences, end to end."""
    parts = list(sequences)
    bounds = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int32)
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int64)
    with torch.inference_mode(False):
        return Packed(torch.from_numpy(tokens), torch.from_numpy(bounds))


@dataclass(frozen=True)
class Encoded:
    """`last` (T, d), and the layers asked for: 0 is the embedding, l the output of layer l, L equals `last`."""

    last: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)


class Encoder(nn.Module):
    """Token numbers to vectors. Shapes and conventions: the module's docstring and `EncoderConfig`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        if config.positions == "rotary":
            self.rotary: Rotary | None = Rotary(config.head_width)
            self.position: nn.Embedding | None = None
        else:
            self.rotary = None
            assert config.max_length is not None
            self.position = nn.Embedding(config.max_length, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        # after the last layer (pre-norm), or after the embedding (post-norm)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        # recompute each layer in the backward pass instead of keeping its activations
        self.recompute = False
        self.observers = Observers()

    def attentions(self) -> Sequence[str]:
        """Names of the layers, as observers receive them."""
        return tuple(f"layers.{number}" for number in range(self.config.layers))

    def observed(self, observer: Observer, method: Method | str | None = None) -> AbstractContextManager[None]:
        """Tell `observer` of each forward pass inside a `with`; those without `attend` run by `method` where given."""
        return self.observers.subscribed(observer, method)

    def forward(
        self,
        packed: Packed,
        *,
        attend: Attend | None = None,
        keep: Collection[int] = (),
        observers: Sequence[Observer] = (),
    ) -> Encoded:
        """Encode packed sequences; `keep` names layers (0..L) whose output is wanted too, `observers` see this pass.

        Raises `InputError` for token numbers, boundaries or lengths that do not fit.
        """
        if not isinstance(packed, Packed):
            raise InputError(
                f"expected packed sequences, such as model.pack(['MKTAYIAK']), got {type(packed).__name__}"
            )
        with self.observers.begin(observers) as forward:
            attend = attend or AttendWith(forward.method or "exact")
            if forward.observers:
                attend = self._reported(attend, forward)
            return self._forward(packed, attend, keep, forward)

    def _reported(self, attend: Attend, forward: ObservedForward) -> Attend:
        """`attend`, each of whose calls is reported."""
        projections = [layer.out.weight for layer in self.layers if isinstance(layer, Layer)]

        def reported(
            query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, cu_seqlens: Tensor
        ) -> Tensor:
            settings = {"scale": scale, "cu_seqlens": cu_seqlens}
            lse = None
            if forward.needs_lse and isinstance(attend, AttendWith):
                output, lse = attend.with_lse(query, key, value, scale=scale, cu_seqlens=cu_seqlens)
            else:
                output = attend(query, key, value, layer=layer, scale=scale, cu_seqlens=cu_seqlens)
            # a function of which nothing is known is taken for exact; the scan compares with its output
            method = attend.method if isinstance(attend, AttendWith) else forward.method or "exact"
            forward.attended(output, lambda: AttentionCall(
                layer, f"layers.{layer}", query, key, value, output, {**settings, "method": method}, lse,
                projections[layer],
            ))  # fmt: skip
            return output

        return reported

    def _forward(self, packed: Packed, attend: Attend, keep: Collection[int], forward: ObservedForward) -> Encoded:
        positions = _positions(packed, self.config)
        x = self.embed(packed, positions)
        angles = self.rotary(positions) if self.rotary is not None else None
        forward.passed(0, x)
        kept = {0: x.clone()} if 0 in keep else {}
        for number, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, angles, attend, number, packed.cu_seqlens, use_reentrant=False)
            else:
                x = layer(x, angles, attend, number, packed.cu_seqlens)
            forward.passed(number + 1, x)
            if number + 1 in keep and number + 1 < self.config.layers:
                kept[number + 1] = x.clone()
        if self.config.pre_norm:
            x = self.norm(x)
        if self.config.layers in keep:
            kept[self.config.layers] = x
        return Encoded(x, kept)

    def embed(self, packed: Packed, positions: Tensor) -> Tensor:
        """(T, d): what enters the first layer."""
        x = self.embedding(packed.tokens)
        if self.config.token_dropout:
            masked = packed.tokens == self.config.mask_token
            lengths = packed.cu_seqlens.diff()
            counts = torch.segment_reduce(masked.float(), "sum", lengths=lengths.long(), unsafe=True)
            # 0.15 * 0.8: the share of tokens that training replaced by <mask>
            factor = (1 - 0.15 * 0.8) / (1 - counts / lengths)
            x = x.masked_fill(masked.unsqueeze(1), 0.0)
            x = x * factor.repeat_interleave(lengths).unsqueeze(1).to(x.dtype)
        if self.position is not None:
            x = x + self.position(positions)
        return x if self.config.pre_norm else self.norm(x)


class Layer(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps)
        # queries, keys and values in one product
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.up = nn.Linear(width, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, width)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None, attend: Attend, number: int, cu_seqlens: Tensor
    ) -> Tensor:
        """(T, d) -> (T, d). Where no gradient is wanted, works in place on `x`, a chunk of tokens at a time."""
        if torch.is_grad_enabled():
            mixed = self._attend(self._project(x, angles).permute(1, 2, 0, 3), attend, number, cu_seqlens)
            x = self._add_attention(x, mixed)
            return self._add_feed_forward(x)
        # token by token, as the product gives it: attention reads it so at no cost, and head by head would be a copy
        qkv = x.new_empty(x.shape[0], 3, self.config.heads, self.config.head_width)
        chunks = _chunks(x.shape[0])
        for rows in chunks:
            part = None if angles is None else (angles[0][rows], angles[1][rows])
            qkv[rows] = self._project(x[rows], part)
        mixed = self._attend(qkv.permute(1, 2, 0, 3), attend, number, cu_seqlens)
        del qkv
        for rows in chunks:
            x[rows] = self._add_feed_forward(self._add_attention(x[rows], mixed[rows]))
        return x

    def _project(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries, keys and values: (T, 3, H, D)."""
        normed = self.attention_norm(x) if self.config.pre_norm else x
        qkv = apply_linear(self.qkv, normed).view(len(x), 3, self.config.heads, self.config.head_width)
        if angles is None:
            return qkv
        if qkv.requires_grad:
            return torch.cat([rotate(qkv[:, :2], angles), qkv[:, 2:]], 1)
        rotate_in_place(qkv[:, :2], angles)
        return qkv

    def _attend(self, qkv: Tensor, attend: Attend, number: int, cu_seqlens: Tensor) -> Tensor:
        """(3, H, T, D) -> (T, d)."""
        query, key, value = qkv.unsqueeze(1)
        out = attend(query, key, value, layer=number, scale=self.config.head_width**-0.5, cu_seqlens=cu_seqlens)
        return out.squeeze(0).transpose(0, 1).flatten(1)

    def _add_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + apply_linear(self.out, mixed)
        return x if self.config.pre_norm else self.attention_norm(x)

    def _add_feed_forward(self, x: Tensor) -> Tensor:
        normed = self.feed_norm(x) if self.config.pre_norm else x
        out = x + apply_linear(self.down, apply_linear_gelu(self.up, normed))
        return out if self.config.pre_norm else self.feed_norm(out)


def _chunks(tokens: int) -> list[slice]:
    """Ranges of at most `CHUNK` tokens, as few as that takes, and of nearly equal length.

    A last chunk of one or two tokens would be multiplied by another kernel, with other rounding: a sequence's vectors
    would then depend on what it was packed with.
    """
    count = -(-tokens // CHUNK)
    bounds = [tokens * part // max(1, count) for part in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _positions(packed: Packed, config: EncoderConfig) -> Tensor:
    """(T,): each token's place in its sequence."""
    tokens, bounds = packed
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        raise InputError(f"expected tokens (T,) of int64, got {tokens.dtype} {tuple(tokens.shape)}")
    if bounds.ndim != 1 or len(bounds) < 2 or int(bounds[-1]) != len(tokens):
        raise InputError(f"expected cu_seqlens (S + 1,) that ends at T = {len(tokens)}, got {bounds.tolist()[-3:]}")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocabulary:
        raise InputError(
            f"expected token numbers in 0..{config.vocabulary - 1}, got {int(tokens.min())}..{int(tokens.max())}"
        )
    lengths = bounds.diff()
    if config.max_length is not None and int(lengths.max()) > config.max_length:
        raise InputError(
            f"expected sequences of at most {config.max_length} tokens, got {int(lengths.max())}; this model learned "
            "one vector for each position and has none beyond"
        )
    starts = bounds[:-1].repeat_interleave(lengths)
    return torch.arange(len(tokens), device=tokens.device) - starts
