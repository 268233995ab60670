"""Look at what a model attends to while it runs.

    with longlens.watch(model, collect=[Entropy(), Received(), TopKeys(8)]) as seen:
        model(**inputs)
    seen.entropy[layer].values      # (B, H, N)
    seen.entropy.to_frame()         # all layers in one table

Inside the `with`, each attention of the model is followed by a scan of its queries and keys (`longlens.lens.scan`),
which also checks that the weights it rebuilds give the attention's own output. Before and after, the model is what it
was. Weights are the model's own: where it lets padded queries attend (BERT does), keys receive from them too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from longlens.errors import InputError
from longlens.lens.collect.collector import Collector, by_name
from longlens.lens.collect.columns import Received
from longlens.lens.collect.rows import Distance, Entropy, Largest, LogSumExp, TopKeys
from longlens.lens.scan import scan
from longlens.lens.statistic import Layered, Statistic, html_of_call
from longlens.ops.attention import attention
from longlens.ops.method import Method

STANDARD: tuple[Collector, ...] = (LogSumExp(), Entropy(), Largest(), Distance(), Received(), TopKeys(8))

# who watches models that are not ours: the module that a class of the model's comes from, and where the watcher lives
GUESTS: Mapping[str, str] = MappingProxyType({"transformers": "longlens.hf.watching:watch_transformers"})


def watch(
    model: nn.Module,
    collect: Sequence[Collector] = STANDARD,
    *,
    layers: Collection[int] | None = None,
    heads: Sequence[int] | None = None,
    method: Method | str | None = None,
) -> AbstractContextManager[Seen]:
    """A context manager that gives a `Seen`, which fills while the model runs inside it.

    Args:
        model: `longlens.models.MaskedLM` or `Encoder`, or a transformers model that `longlens.hf.attach` serves.
        collect: what to collect in each layer (`longlens.lens.collect.collector`); the standard set where not given.
        layers: which layers to look at, from 0, negative from the end; all where None. A transformers model's layers
            are its attention modules in the order of its modules (`seen.names` tells which is which).
        heads: which query heads, from 0; all where None. Results hold these heads in this order.
        method: run the model's attention by this method and look at its weights; None leaves the model's own (exact
            unless the model is attached to another).

    Raises:
        InputError: layers or heads that the model does not have, or a model that cannot be watched.
        UnsupportedError: a method without weights, a model that cannot be served.
        LensError, from the model's forward: the weights that were rebuilt do not give the attention's own output.
    """
    if not by_name(collect):
        raise InputError("expected at least one collector, got none")
    encoders = [module for module in model.modules() if _takes_attend(module)]
    if encoders:
        # a model hands `attend` down: the innermost takes it last
        return _watch_ours(encoders[-1], tuple(collect), layers, heads, method)
    for base in type(model).__mro__:
        home = GUESTS.get(base.__module__.partition(".")[0])
        if home is not None:
            module, _, name = home.partition(":")
            return getattr(import_module(module), name)(model, tuple(collect), layers, heads, method)
    raise InputError(
        f"expected a model of longlens or of transformers, got {type(model).__name__}; for others call "
        "longlens.lens.scan.scan on their queries and keys"
    )


class Seen:
    """What was seen. `seen.NAME` holds the statistics of the collector of that name, by layer.

    `calls` holds the results of each call of the model that ended, {layer: {name: result}}; attributes show the last.
    """

    def __init__(self, collect: Sequence[Collector], names: Sequence[str]) -> None:
        self.calls: list[dict[int, dict[str, Statistic]]] = []
        # what the model calls each layer's attention
        self.names = tuple(names)
        self._collected = tuple(collector.name for collector in collect)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers seen in the last call."""
        return tuple(sorted(self._last()))

    def __getattr__(self, name: str) -> Layered:
        if name.startswith("_") or name not in self._collected:
            collected = ", ".join(self.__dict__.get("_collected", ()))
            raise AttributeError(f"nothing called {name!r} was collected; there is {collected}")
        return Layered(name, {layer: results[name] for layer, results in sorted(self._last().items())})

    def _last(self) -> dict[int, dict[str, Statistic]]:
        if not self.calls:
            raise InputError("expected the model to be called inside the `with`; nothing was seen yet")
        return self.calls[-1]

    def __repr__(self) -> str:
        return f"Seen({', '.join(self._collected)}; {len(self.calls)} calls)"

    def _repr_html_(self) -> str:
        return html_of_call(self.calls[-1] if self.calls else {}, repr(self))


def chosen_layers(layers: Collection[int] | None, count: int) -> set[int]:
    """Layer numbers from 0, checked."""
    if layers is None:
        return set(range(count))
    found = set()
    for layer in layers:
        if not -count <= layer < count:
            raise InputError(f"expected layers of 0..{count - 1} (or negative, from the end), got {layer!r}")
        found.add(layer % count)
    return found


def check_heads(heads: Sequence[int] | None, count: int) -> None:
    """Raise `InputError` unless all `heads` exist."""
    if heads is not None and (not heads or any(not 0 <= head < count for head in heads)):
        raise InputError(f"expected heads of 0..{count - 1}, at least one, got {list(heads)}")


def _takes_attend(module: nn.Module) -> bool:
    """Whether attention is an argument of the module's call, with a default."""
    attend = inspect.signature(type(module).forward).parameters.get("attend")
    return attend is not None and attend.kind is inspect.Parameter.KEYWORD_ONLY


@contextmanager
def _watch_ours(
    encoder: nn.Module,
    collect: tuple[Collector, ...],
    layers: Collection[int] | None,
    heads: Sequence[int] | None,
    method: Method | str | None,
) -> Iterator[Seen]:
    names = [name for name, _ in encoder.named_modules() if name.startswith("layers.") and name.count(".") == 1]
    wanted = chosen_layers(layers, len(names))
    seen = Seen(collect, names)
    current: dict[int, dict[str, Statistic]] = {}

    def before(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        current.clear()
        look = _looking(given.get("attend"), method, collect, wanted, heads, current)
        return args, {**given, "attend": look}

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen.calls.append(dict(current))

    hooks = [encoder.register_forward_pre_hook(before, with_kwargs=True), encoder.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _looking(
    attend: Callable[..., Tensor] | None,
    method: Method | str | None,
    collect: tuple[Collector, ...],
    wanted: set[int],
    heads: Sequence[int] | None,
    results: dict[int, dict[str, Statistic]],
) -> Callable[..., Tensor]:
    """`attend`, or attention by `method`, followed by a scan that adds to `results`."""
    chosen = "exact" if method is None else method

    def look(query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, cu_seqlens: Tensor) -> Tensor:
        if attend is None:
            output = attention(query, key, value, scale=scale, cu_seqlens=cu_seqlens, method=chosen)
            assert isinstance(output, Tensor)
        else:
            output = attend(query, key, value, layer=layer, scale=scale, cu_seqlens=cu_seqlens)
        # recomputed layers run again in the backward pass, where there is nothing new to see
        if layer in wanted and layer not in results:
            check_heads(heads, query.shape[1])
            parts = (query, key, value, output)
            q, k, v, o = parts if heads is None else (part[:, list(heads)] for part in parts)
            results[layer] = scan(
                q, k, collect=collect, value=v, output=o, scale=scale, method=chosen, cu_seqlens=cu_seqlens,
                where=f"layer {layer}",
            )  # fmt: skip
        return output

    return look
