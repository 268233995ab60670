"""The observers of a model (`longlens.ops.observe`), and the calls that they receive in each forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor

from longlens.ops.method import Method
from longlens.ops.observe import AttentionCall, ForwardObserver, Observer, keep_in_graph


class Observers:
    """Subscriptions to a model. A copy of the model, and a model read from a file, start without any."""

    def __init__(self) -> None:
        self._subscriptions: tuple[tuple[Observer, Method | str | None], ...] = ()
        self._lock = Lock()

    @contextmanager
    def subscribed(self, observer: Observer, method: Method | str | None) -> Iterator[None]:
        """Send `observer` each forward pass that begins inside the `with`."""
        entry = (observer, method)
        with self._lock:
            self._subscriptions = (*self._subscriptions, entry)
        try:
            yield
        finally:
            with self._lock:
                self._subscriptions = tuple(other for other in self._subscriptions if other is not entry)

    def begin(self, more: Sequence[Observer]) -> ObservedForward:
        """Begin a forward pass; `more` are further observers of this pass alone."""
        subscriptions = self._subscriptions
        methods = [method for _, method in subscriptions if method is not None]
        return ObservedForward([*(observer for observer, _ in subscriptions), *more], methods[-1] if methods else None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class ObservedForward:
    """One forward pass and its observers. `method`: the method of attention that an observer asked for, or None.

    A context manager: the pass has ended when the `with` is left without an exception. After that observers receive
    nothing, in particular not the layers that the backward pass computes again.
    """

    def __init__(self, observers: Sequence[Observer], method: Method | str | None) -> None:
        self.observers, self.method = observers, method
        self._forwards: list[ForwardObserver] = []
        self._open = True

    def __enter__(self) -> Self:
        self._forwards = [observer.begin() for observer in self.observers]
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._open = False
        if kind is None:
            for forward in self._forwards:
                forward.ended()

    @property
    def needs_lse(self) -> bool:
        """Whether an observer needs the log-sum-exp."""
        return any(observer.needs_lse for observer in self.observers)

    def attended(self, output: Tensor, make: Callable[[], AttentionCall]) -> None:
        """Send the call that `make` returns, whose attention computed `output`."""
        keep_in_graph(self.observers, output)
        if self._open and self._forwards:
            with torch.no_grad():
                call = make()
                for forward in self._forwards:
                    forward.attended(call)

    def passed(self, layer: int, stream: Tensor) -> None:
        """Send the residual stream after a layer."""
        with torch.no_grad():
            for forward in self._forwards:
                forward.passed(layer, stream)
