"""Watch a transformers model: its attention runs attached, and each call is scanned."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from longlens.errors import InputError, UnsupportedError
from longlens.hf.attach import Attachment, attached_method, attention_modules, inner_models, is_transformers_model
from longlens.hf.calls import Call
from longlens.lens.collect.collector import Collector
from longlens.lens.scan import scan
from longlens.lens.statistic import Statistic
from longlens.lens.watch import Seen, check_heads, chosen_layers
from longlens.ops.attention import resolve_method
from longlens.ops.method import Method


@contextmanager
def watch_transformers(
    model: nn.Module,
    collect: tuple[Collector, ...],
    layers: Collection[int] | None,
    heads: Sequence[int] | None,
    method: Method | str | None,
) -> Iterator[Seen]:
    """`longlens.watch` for a transformers model; arguments as there.

    Layers are numbered by their modules, since not every model tells its attention which layer it is. In training,
    weights are those before dropout, and the self-check is off where dropout is on.
    """
    if not is_transformers_model(model):
        raise InputError(f"expected a transformers model, got {type(model).__name__}")
    modules = attention_modules(model)
    wanted = chosen_layers(layers, len(modules))
    chosen = resolve_method(method if method is not None else attached_method(model) or "exact")
    seen = Seen(collect, list(modules))
    recorder = _Recorder(seen, modules, wanted, heads, collect)
    with Attachment(model, chosen, recorder.observe):
        hooks = [
            hook
            for inner in inner_models(model)
            for hook in (
                inner.register_forward_pre_hook(recorder.begin),
                inner.register_forward_hook(recorder.end, always_call=True),
            )
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


class _Recorder:
    """Results of one call of the model at a time; the outermost of nested models opens and closes it."""

    def __init__(
        self, seen: Seen, modules: dict[str, nn.Module], wanted: set[int], heads: Sequence[int] | None,
        collect: tuple[Collector, ...],
    ) -> None:  # fmt: skip
        self.seen, self.wanted, self.heads, self.collect = seen, wanted, heads, collect
        self._numbers = WeakKeyDictionary({module: number for number, module in enumerate(modules.values())})
        self._open: list[nn.Module] = []
        self._results: dict[int, dict[str, Statistic]] = {}

    def begin(self, module: nn.Module, args: Any) -> None:
        """Before a model's forward."""
        if not self._open:
            self._results = {}
        self._open.append(module)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a model's forward, also one that failed (`output` is then None)."""
        while self._open and self._open.pop() is not module:
            pass
        if not self._open and output is not None:
            self.seen.calls.append(self._results)

    def observe(self, module: nn.Module, call: Call, method: Method, output: Tensor) -> None:
        """One attention: scan it if its layer is wanted."""
        number = self._numbers.get(module)
        # outside of any call, layers are recomputed for the backward pass; another model's are not ours to see
        if number is None or not self._open or number not in self.wanted:
            return
        name = self.seen.names[number]
        if number in self._results:
            raise UnsupportedError(
                f"layer {number} ({name}) attends more than once in a call: layers that share their weights (ALBERT) "
                "cannot be told apart, so this model cannot be watched"
            )
        check_heads(self.heads, call.query.shape[1])
        if self.heads is not None:
            call, output = call.of_heads(self.heads), output[:, list(self.heads)]
        # dropped weights do not give the output back
        value, given = (None, None) if call.dropout else (call.value, output)
        self._results[number] = scan(
            call.query, call.key, collect=self.collect, value=value, output=given, method=method,
            where=f"layer {number} ({name})", **call.for_scan(),
        )  # fmt: skip
