"""How a model reports what its attention did: an `AttentionCall` for each layer, to each `Observer` that subscribed.

    model            `Observable`: names its attentions, and takes a subscription
    observer         `Observer`: is asked at the beginning of each forward pass for
    one forward      `ForwardObserver`: gets each attention call, each layer's output, and the end if it was reached

What an observer learns of one forward pass lies in that pass's own `ForwardObserver`, so several threads may run a
model that is observed. A pass that fails is never ended: what was seen of it is dropped. Layers that are computed again
in the backward pass (activation checkpointing) are reported once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from longlens.errors import UnsupportedError
from longlens.ops.biases import Bias
from longlens.ops.method import Method


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One layer's attention in one forward pass: what it got, and what it gave.

    layer: its number from 0, as the model counts its attentions.
    name: what the model calls it.
    query (B, H, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv): after any rotation. They are the model's own
        memory, which it may write to later: an observer that keeps them copies them.
    output (B, H, Nq, Dv): the tensor that the model goes on with; None in a call that was kept.
    settings: the keywords of `longlens.attention` that give `output` (scale, masks, cu_seqlens, bias, softcap, sinks,
        method, dropout_p); without dropout_p, those of `longlens.scan`.
    lse (B, H, Nq): log-sum-exp in float32, where the observer needs it and the model has it at hand.
    projection (d, H Dv): weight of the linear layer that follows, heads in order, where it is known.
    output_gradient (B, H, Nq, Dv): set by `CallRecorder` once `backward()` has run.
    """

    layer: int
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    lse: Tensor | None = None
    projection: Tensor | None = None
    output_gradient: Tensor | None = None

    def of_heads(self, heads: Sequence[int]) -> AttentionCall:
        """The call for some query heads alone, in this order, each with a key head of its own."""
        groups = self.query.shape[1] // self.key.shape[1]
        chosen = list(heads)
        shared = [head // groups for head in chosen]
        settings = dict(self.settings)
        bias = settings.get("bias")
        if isinstance(bias, Bias):
            settings["bias"] = bias.of_heads(chosen)
            if settings["bias"] is None:
                raise UnsupportedError(
                    f"layer {self.layer} ({self.name}): a bias of this kind is of all heads; look at all of them"
                )
        for name in ("attn_mask", "bias"):
            tensor = settings.get(name)
            if isinstance(tensor, Tensor) and tensor.ndim == 4 and tensor.shape[1] > 1:
                settings[name] = tensor[:, chosen]
        if settings.get("sinks") is not None:
            settings["sinks"] = settings["sinks"][chosen]
        projection = self.projection
        if projection is not None:
            projection = projection.unflatten(1, (-1, self.value.shape[3]))[:, chosen].flatten(1)
        cut = (
            None if tensor is None else tensor[:, chosen] for tensor in (self.output, self.lse, self.output_gradient)
        )
        output, lse, gradient = cut
        return replace(
            self, query=self.query[:, chosen], key=self.key[:, shared], value=self.value[:, shared], output=output,
            settings=settings, lse=lse, projection=projection, output_gradient=gradient,
        )  # fmt: skip


class ForwardObserver:
    """What sees one forward pass. Each method does nothing unless a subclass says otherwise.

    They are called under `torch.no_grad()`: what they compute is no part of the model's graph.
    """

    def attended(self, call: AttentionCall) -> None:
        """A layer's attention ran, and its output has not been used yet."""

    def passed(self, layer: int, stream: Tensor) -> None:
        """The residual stream (..., d) after layer `layer`, counted from 1; 0 is what enters the first layer."""

    def ended(self) -> None:
        """The forward pass ended, and did not fail."""


class Observer:
    """Receives the attention calls of a model's forward passes."""

    # the log-sum-exp of each call is wanted, where the model's attention can give it with its output
    needs_lse = False
    # outputs shall be part of a graph, also where no parameter needs a gradient
    needs_gradient = False

    def begin(self) -> ForwardObserver:
        """A forward pass begins; in the thread that runs it."""
        raise NotImplementedError


@runtime_checkable
class Observable(Protocol):
    """A model that tells observers what its attentions do."""

    def attentions(self) -> Sequence[str]:
        """Names of the attentions, in the order of their numbers."""

    def observed(self, observer: Observer, method: Method | str | None = None) -> AbstractContextManager[object]:
        """Subscribe `observer` until the end of a `with`, and run attention by `method` unless it is None."""


def keep_in_graph(observers: Sequence[Observer], output: Tensor) -> None:
    """Make an attention's output part of a graph where an observer needs its gradient; also when it is recomputed."""
    wanted = torch.is_grad_enabled() and not output.requires_grad
    if wanted and any(observer.needs_gradient for observer in observers):
        output.requires_grad_()
