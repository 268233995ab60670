"""One layer of an encoder: attention and feed-forward on the residual stream (T, d) of packed sequences."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longlens.models.attend import Attend
from longlens.models.config import EncoderConfig
from longlens.models.linear import apply_linear
from longlens.models.rotary import rotate, rotate_in_place
from longlens.ops.biases import Bias

# tokens whose feed-forward activations are held at a time, where no gradient is wanted
CHUNK = 1024
# and on an accelerator, where it is the start of a kernel that takes time
MANY = 8192


class Places(NamedTuple):
    """Where tokens stand: boundaries of the sequences, rotary angles (cosines, sines) and bias, where there are any."""

    cu_seqlens: Tensor
    angles: tuple[Tensor, Tensor] | None = None
    bias: Bias | None = None


class Layer(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, inner, parts = config.width, config.inner, config.projections
        self.attention_norm = config.norm.make(width)
        # queries, keys and values in one product
        self.qkv = nn.Linear(width, 3 * inner, bias=parts.bias)
        self.query_norm = parts.query_key_norm.make(inner) if parts.query_key_norm else None
        self.key_norm = parts.query_key_norm.make(inner) if parts.query_key_norm else None
        self.out = nn.Linear(inner, width, bias=parts.bias)
        self.feed_norm = config.norm.make(width)
        self.up = config.feed.make_up(width, config.feed_forward)
        self.down = config.feed.make_down(width, config.feed_forward)

    def forward(self, x: Tensor, places: Places, attend: Attend, number: int) -> Tensor:
        """(T, d) -> (T, d). Where no gradient is wanted, works in place on `x`, a chunk of tokens at a time."""
        angles = places.angles
        if torch.is_grad_enabled():
            mixed = self._attend(self._project(x, angles).permute(1, 2, 0, 3), attend, number, places)
            x = self._add_attention(x, mixed)
            return self._add_feed_forward(x)
        # token by token, as the product gives it: attention reads it so at no cost, and head by head would be a copy
        qkv = x.new_empty(x.shape[0], 3, self.config.heads, self.config.head_width)
        chunks = _chunks(x.shape[0], CHUNK if x.device.type == "cpu" else MANY)
        for rows in chunks:
            part = None if angles is None else (angles[0][rows], angles[1][rows])
            qkv[rows] = self._project(x[rows], part)
        mixed = self._attend(qkv.permute(1, 2, 0, 3), attend, number, places)
        del qkv
        for rows in chunks:
            x[rows] = self._add_feed_forward(self._add_attention(x[rows], mixed[rows]))
        return x

    def _project(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries, keys and values: (T, 3, H, D)."""
        normed = self.attention_norm(x) if self.config.pre_norm else x
        qkv = apply_linear(self.qkv, normed).view(len(x), 3, self.config.heads, self.config.head_width)
        if self.query_norm is not None and self.key_norm is not None:
            qkv = self._norm_queries_and_keys(qkv, self.query_norm, self.key_norm)
        if angles is None:
            return qkv
        if qkv.requires_grad:
            return torch.cat([rotate(qkv[:, :2], angles), qkv[:, 2:]], 1)
        rotate_in_place(qkv[:, :2], angles)
        return qkv

    @staticmethod
    def _norm_queries_and_keys(qkv: Tensor, query_norm: nn.Module, key_norm: nn.Module) -> Tensor:
        """`qkv` with queries and keys normalised over all heads together; in place where it needs no gradient."""
        normed = [
            norm(qkv[:, place].flatten(1)).view_as(qkv[:, place]) for place, norm in enumerate((query_norm, key_norm))
        ]
        if qkv.requires_grad or any(part.requires_grad for part in normed):
            return torch.stack([*normed, qkv[:, 2]], 1)
        for place, part in enumerate(normed):
            qkv[:, place] = part
        return qkv

    def _attend(self, qkv: Tensor, attend: Attend, number: int, places: Places) -> Tensor:
        """(3, H, T, D) -> (T, H D)."""
        query, key, value = qkv.unsqueeze(1)
        # functions of attention that know of no bias serve where there is none
        more = {} if places.bias is None else {"bias": places.bias}
        out = attend(query, key, value, layer=number, scale=self.config.scale, cu_seqlens=places.cu_seqlens, **more)
        return out.squeeze(0).transpose(0, 1).flatten(1)

    def _add_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = self._add(x, apply_linear(self.out, mixed))
        return x if self.config.pre_norm else self.attention_norm(x)

    def _add_feed_forward(self, x: Tensor) -> Tensor:
        normed = self.feed_norm(x) if self.config.pre_norm else x
        out = self._add(x, self.config.feed(self.up, self.down, normed))
        return out if self.config.pre_norm else self.feed_norm(out)

    def _add(self, x: Tensor, block: Tensor) -> Tensor:
        divisor = self.config.residual_divisor
        return x + block if divisor == 1.0 else x + block / divisor


def _chunks(tokens: int, most: int) -> list[slice]:
    """Ranges of at most `most` tokens, as few as that takes, and of nearly equal length.

    A last chunk of one or two tokens would be multiplied by another kernel, with other rounding: a sequence's vectors
    would then depend on what it was packed with.
    """
    count = -(-tokens // most)
    bounds = [tokens * part // max(1, count) for part in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]
