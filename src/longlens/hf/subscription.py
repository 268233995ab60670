"""The subscription of one observer to a transformers model that is attached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import local
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from longlens.errors import InputError, UnsupportedError
from longlens.hf.arguments import AttentionArguments
from longlens.hf.copies import AttachedName, ForwardHook
from longlens.hf.modules import (
    attends_in_parts,
    attention_modules,
    inner_models,
    projection_of,
    projection_weight,
)
from longlens.ops.method import Method
from longlens.ops.observe import AttentionCall, ForwardObserver, Observer


class _ForwardPass(local):
    """The forward pass of this thread: the models that were entered, the outermost first, and the calls so far."""

    def __init__(self) -> None:
        self.entered: list[nn.Module] = []
        self.forward: ForwardObserver | None = None
        self.layers: set[int] = set()
        # the calls of an attention that attends in parts, until it has returned
        self.parts: list[AttentionCall] | None = None


class Subscription:
    """One observer of one model. The outermost of nested models begins and ends a forward pass."""

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        self.observer = observer
        modules = attention_modules(model)
        self._places = WeakKeyDictionary({
            module: (number, name, projection_of(model, name)) for number, (name, module) in enumerate(modules.items())
        })  # fmt: skip
        self._models = list(inner_models(model))
        self._in_parts = [module for module in modules.values() if attends_in_parts(module)]
        self._pass = _ForwardPass()

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Observe the model's forward passes by hooks until the end of the `with`."""
        hooks: list[Any] = []
        try:
            for module, begin, end in (
                *((inner, self._begin, self._end) for inner in self._models),
                *((module, self._begin_parts, self._end_parts) for module in self._in_parts),
            ):
                hooks.append(module.register_forward_pre_hook(ForwardHook(torch.compiler.disable(begin))))
                hooks.append(module.register_forward_hook(ForwardHook(torch.compiler.disable(end)), always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, module: Any, args: Any) -> None:
        now = self._pass
        # a model that is entered again inside itself: the pass before was interrupted and did not end
        if module in now.entered:
            now.entered = []
        if not now.entered:
            if not isinstance(module.config._attn_implementation_internal, AttachedName):
                raise InputError(
                    f"{type(module).__name__}: set_attn_implementation was called while the model was observed, so its "
                    "attention can no longer be observed; call it before or after"
                )
            now.forward, now.layers, now.parts = self.observer.begin(), set(), None
        now.entered.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        # called after a pass that failed, too; `output` is then None
        now = self._pass
        while now.entered and now.entered.pop() is not module:
            pass
        if not now.entered and now.forward is not None:
            forward, now.forward = now.forward, None
            if output is not None:
                forward.ended()

    def _begin_parts(self, module: nn.Module, args: Any) -> None:
        self._pass.parts = []

    def _end_parts(self, module: nn.Module, args: Any, output: Any) -> None:
        parts, self._pass.parts = self._pass.parts, None
        if parts and output is not None:
            with torch.no_grad():
                self._tell(_joined(parts))

    def attended(self, module: nn.Module, arguments: AttentionArguments, method: Method, output: Tensor) -> None:
        """Send one attention call to the observer, if a pass of this model is running in this thread."""
        now, place = self._pass, self._places.get(module)
        # outside of any pass, layers are recomputed for the backward pass; calls of another model are not observed
        if place is None or now.forward is None:
            return
        number, name, projection = place
        call = AttentionCall(
            number, name, arguments.query, arguments.key, arguments.value, output, arguments.settings(method),
            projection=projection_weight(projection),
        )  # fmt: skip
        if now.parts is None:
            self._tell(call)
        else:
            now.parts.append(call)

    def _tell(self, call: AttentionCall) -> None:
        now = self._pass
        if now.forward is None:
            return
        if call.layer in now.layers:
            raise UnsupportedError(
                f"layer {call.layer} ({call.name}) attends more than once in a forward pass: layers that share their "
                "weights (ALBERT) cannot be distinguished, so this model cannot be watched"
            )
        now.layers.add(call.layer)
        with torch.no_grad():
            now.forward.attended(call)


def _joined(parts: list[AttentionCall]) -> AttentionCall:
    """Successive calls of one layer on parts of its tokens, as one call on packed sequences."""
    first = parts[0]
    if len(parts) == 1:
        return first
    plain = {"scale", "method", "is_causal", "dropout_p", "softcap"}
    all_settings = {name for part in parts for name, value in part.settings.items() if value is not None}
    unserved = all_settings - plain
    if unserved or any(len(part.query) != 1 or part.query.shape[2] != part.key.shape[2] for part in parts):
        raise UnsupportedError(
            f"layer {first.layer} ({first.name}) attends to its tokens in parts that have different masks or keys, "
            "which cannot be watched"
        )
    lengths = torch.tensor([0, *(part.query.shape[2] for part in parts)], device=first.query.device)
    query, key, value = (torch.cat([getattr(part, name) for part in parts], 2) for name in ("query", "key", "value"))
    output = torch.cat([part.output for part in parts if part.output is not None], 2)
    settings = {**first.settings, "cu_seqlens": lengths.cumsum(0).to(torch.int32)}
    return replace(first, query=query, key=key, value=value, output=output, settings=settings)
