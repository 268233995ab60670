"""The logit lens: what each layer would predict if it were the last (nostalgebraist 2020, "interpreting GPT: the logit
lens").

The residual stream after each layer goes through the model's final norm and head, which were trained for the last layer
alone: early layers may hold what the head cannot read. The last layer's row is the model's own prediction.

    path = longlens.trajectories(model, model.pack(["MKTAYIAKQRQISFVKSHFSRQ"]), tokens)
    path[3].surprise                                           # (T,), layer 3; 0 is the embedding, L the last
    path.to_frame()                                            # layer, batch, token, ...

Each layer is read while the model runs, a chunk of tokens at a time: neither (T, V) nor all layers' vectors are held.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from longlens.lens.predict.vocabulary import Head, Predictions, predictions
from longlens.lens.statistic import Layered, Statistic
from longlens.lens.watch import chosen_layers
from longlens.ops.observe import ForwardObserver, Observer
from longlens.report import statistics

if TYPE_CHECKING:
    from longlens.report.figures import Axes


@dataclass(frozen=True, repr=False)
class Trajectories(Layered):
    """`Predictions` of each layer: `path[layer]`, 0 the embedding, L the last layer."""

    results: Mapping[int, Predictions]

    def draw(self, ax: Axes) -> None:
        """Surprise (entropy where there are no targets) of batch row 0: layers upwards, tokens to the right."""
        what = "entropy" if any(layer.surprise is None for layer in self.results.values()) else "surprise"
        tables = [layer.columns() for layer in self.results.values()]
        first = tables[0]["batch"] == tables[0]["batch"][0]
        shown = np.stack([table[what][first] for table in tables])
        statistics.draw_layers(ax, shown, list(self.results), what)

    def plot(self, ax: Axes | None = None) -> Any:
        """All layers on one axes; returns it. Needs matplotlib (extra `plot`)."""
        return Statistic.plot(self, ax)

    def _picture(self) -> str | None:
        return Statistic._picture(self)


@dataclass(frozen=True)
class Reading:
    """How hidden vectors (T, d) become `Predictions`; `rows` (T,), where given, says which tokens to read."""

    head: Head | Callable[[Tensor], Tensor]
    targets: Tensor | None
    places: Tensor
    top: int
    chunk: int | None
    rows: Tensor | None = None

    def __call__(self, stream: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Predictions:
        """Predictions from a residual stream (..., d), through `norm` and the head a chunk at a time."""
        stream = stream.flatten(0, -2)
        stream = stream if self.rows is None else stream[self.rows]
        return predictions(
            stream, _after(norm, self.head), self.targets, top=self.top, chunk=self.chunk, places=self.places
        )


def _after(norm: Callable[[Tensor], Tensor] | None, head: Head | Callable[[Tensor], Tensor]) -> Any:
    """`head` of the normed vectors."""
    if norm is None:
        return head
    if isinstance(head, Head):
        return Head(head.weight, head.bias, lambda hidden: head.features(norm(hidden)), head.softcap)
    return lambda hidden: head(norm(hidden))


class TrajectoryObserver(Observer):
    """Reads the residual stream of a model of `count` layers while it runs: layer 0 is what enters the first.

    `norm` is the model's last norm, which the stream goes through before the head; None where each layer ends in one.
    """

    def __init__(
        self, reading: Reading, norm: Callable[[Tensor], Tensor] | None, count: int, layers: Collection[int] | None
    ) -> None:
        self.reading, self.norm = reading, norm
        self.layers = chosen_layers(layers, count + 1)
        self._last: dict[int, Predictions] = {}

    def begin(self) -> ForwardObserver:
        return _ReadForward(self)

    def trajectories(self) -> Trajectories:
        """What was read in the last forward pass."""
        return Trajectories("predictions", dict(sorted(self._last.items())))


class _ReadForward(ForwardObserver):
    def __init__(self, observer: TrajectoryObserver) -> None:
        self.observer = observer
        self.predictions: dict[int, Predictions] = {}

    def passed(self, layer: int, stream: Tensor) -> None:
        if layer in self.observer.layers:
            self.predictions[layer] = self.observer.reading(stream, self.observer.norm)

    def ended(self) -> None:
        self.observer._last = self.predictions
