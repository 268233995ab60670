"""Statistics of a model's attention while it runs: the observer behind `longlens.watch`, and the results it fills.

    with longlens.watch(model, collect=[Entropy(), Received(), TopKeys(8)]) as seen:
        model(**inputs)
    seen.entropy[layer].values      # (B, H, N)
    seen.entropy.to_frame()         # all layers in one table

Each attention of the model is followed by a scan of its queries and keys (`longlens.lens.scan`), which also checks
that the weights it rebuilds give the attention's own output. Weights are the model's own: where it lets padded queries
attend (BERT does), their attention counts in the statistics of keys too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from longlens.errors import InputError
from longlens.lens.calls import scan_call
from longlens.lens.collect.collector import Collector
from longlens.lens.collect.columns import Received
from longlens.lens.collect.rows import Distance, Entropy, Largest, LogSumExp, TopKeys
from longlens.lens.statistic import Layered, Statistic, html_of_call
from longlens.ops.observe import AttentionCall, ForwardObserver, Observer

STANDARD: tuple[Collector, ...] = (LogSumExp(), Entropy(), Largest(), Distance(), Received(), TopKeys(8))


class Seen:
    """The results. `seen.NAME` is a `Layered` of the statistics of the collector NAME, by layer, from the last call.

    `calls` has the results of every call of the model that ended without an error, {layer: {name: statistic}}.
    """

    def __init__(self, collect: Sequence[Collector], names: Sequence[str]) -> None:
        self.calls: list[dict[int, dict[str, Statistic]]] = []
        # the name of each layer's attention module
        self.names = tuple(names)
        self._collected = tuple(collector.name for collector in collect)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that were scanned in the last call."""
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
    numbers = set()
    for layer in layers:
        if not -count <= layer < count:
            raise InputError(f"expected layers of 0..{count - 1} (or negative, from the end), got {layer!r}")
        numbers.add(layer % count)
    return numbers


class WatchObserver(Observer):
    """Scans each attention call of `layers`, and adds a forward pass's results to `seen` when it ends."""

    def __init__(self, seen: Seen, collect: Sequence[Collector], layers: set[int], heads: Sequence[int] | None) -> None:
        self.seen, self.collect, self.layers, self.heads = seen, tuple(collect), layers, heads

    def begin(self) -> ForwardObserver:
        return _WatchedForward(self)


class _WatchedForward(ForwardObserver):
    def __init__(self, observer: WatchObserver) -> None:
        self.observer = observer
        self.results: dict[int, dict[str, Statistic]] = {}

    def attended(self, call: AttentionCall) -> None:
        if call.layer in self.observer.layers:
            self.results[call.layer] = scan_call(call, self.observer.collect, self.observer.heads)

    def ended(self) -> None:
        self.observer.seen.calls.append(self.results)
