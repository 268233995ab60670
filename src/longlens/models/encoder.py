"""A Transformer encoder that runs packed: sequences lie end to end, without padding, in memory linear in their length.

The residual stream is (T, d) for T tokens of all sequences together; attention gets their boundaries. Attention
itself is an argument (`attend`), so that any method serves. Its calls are reported to observers
(`longlens.ops.observe`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longlens.errors import InputError
from longlens.models.attend import Attend, AttendWith, attend_with
from longlens.models.config import EncoderConfig
from longlens.models.layer import CHUNK, Layer, Places
from longlens.models.observers import ObservedForward, Observers
from longlens.models.parts.positions import LearnedPositions, RelativeBias, RelativePositions, RotaryPositions
from longlens.models.rotary import Rotary
from longlens.ops.biases import Bias
from longlens.ops.bounds import bounds_of, know_bounds
from longlens.ops.method import Method
from longlens.ops.observe import AttentionCall, Observer

# what a model of packed sequences is made of is imported from here
__all__ = [
    "CHUNK", "Attend", "AttendWith", "Encoded", "Encoder", "EncoderConfig", "Layer", "Packed", "Places", "attend_with",
    "pack",
]  # fmt: skip


class Packed(NamedTuple):
    """Sequences end to end: `tokens` (T,) int64, `cu_seqlens` (S + 1,) int32.

    `chains`, where sequences are complexes of several chains: boundaries (C + 1,) int32 that are finer than
    `cu_seqlens`; attention stays within a chain, while positions run on through a sequence.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    chains: Tensor | None = None

    def to(self, device: torch.device | str) -> Packed:
        bounds = bounds_of(self.cu_seqlens)
        # a tensor made in inference mode does not tell whether it was written to, and would be read in every layer
        with torch.inference_mode(False):
            chains = None if self.chains is None else self.chains.to(device)
            moved = Packed(self.tokens.to(device), self.cu_seqlens.to(device), chains)
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
        self.rotary: Rotary | None = None
        self.position: nn.Embedding | None = None
        self.position_norm: nn.Module | None = None
        self.relative: RelativeBias | None = None
        match config.positions:
            case RotaryPositions(base):
                self.rotary = Rotary(config.head_width, base)
            case LearnedPositions(rows, _, normed):
                self.position = nn.Embedding(rows, config.width)
                self.position_norm = config.norm.make(config.width) if normed else None
            case RelativePositions():
                self.relative = RelativeBias(config.positions, config.heads)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        # after the last layer (pre-norm), or after the embedding (post-norm)
        self.norm = (config.last_norm or config.norm).make(config.width)
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
            query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, cu_seqlens: Tensor,
            bias: Bias | None = None,
        ) -> Tensor:  # fmt: skip
            settings: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens}
            settings |= {} if bias is None else {"bias": bias}
            lse = None
            if forward.needs_lse and isinstance(attend, AttendWith):
                output, lse = attend.with_lse(query, key, value, **settings)
            else:
                output = attend(query, key, value, layer=layer, **settings)
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
        places = Places(
            packed.cu_seqlens if packed.chains is None else packed.chains,
            None if self.rotary is None else self.rotary(positions),
            None if self.relative is None else self.relative(),
        )  # fmt: skip
        forward.passed(0, x)
        kept = {0: x.clone()} if 0 in keep else {}
        for number, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, places, attend, number, use_reentrant=False)
            else:
                x = layer(x, places, attend, number)
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
            factor = (1 - 0.15 * 0.8) / (1 - counts / lengths).to(torch.promote_types(x.dtype, torch.float32))
            x = x.masked_fill(masked.unsqueeze(1), 0.0)
            x = x * factor.repeat_interleave(lengths).unsqueeze(1).to(x.dtype)
        if self.position is not None and isinstance(self.config.positions, LearnedPositions):
            offset = self.config.positions.offset
            x = x + self.position(positions + offset if offset else positions)
            x = x if self.position_norm is None else self.position_norm(x)
        return x if self.config.pre_norm else self.norm(x)


def _positions(packed: Packed, config: EncoderConfig) -> Tensor:
    """(T,): each token's place in its sequence."""
    tokens, bounds, chains = packed
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        raise InputError(f"expected tokens (T,) of int64, got {tokens.dtype} {tuple(tokens.shape)}")
    if bounds.ndim != 1 or len(bounds) < 2 or int(bounds[-1]) != len(tokens):
        raise InputError(f"expected cu_seqlens (S + 1,) that ends at T = {len(tokens)}, got {bounds.tolist()[-3:]}")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocabulary:
        raise InputError(
            f"expected token numbers in 0..{config.vocabulary - 1}, got {int(tokens.min())}..{int(tokens.max())}"
        )
    if chains is not None and not torch.isin(bounds, chains).all():
        raise InputError("expected the boundaries of sequences to be boundaries of chains too")
    lengths = bounds.diff()
    if config.max_length is not None and int(lengths.max()) > config.max_length:
        raise InputError(
            f"expected sequences of at most {config.max_length} tokens, got {int(lengths.max())}; this model learned "
            "one vector for each position and has none beyond"
        )
    starts = bounds[:-1].repeat_interleave(lengths)
    return torch.arange(len(tokens), device=tokens.device) - starts
