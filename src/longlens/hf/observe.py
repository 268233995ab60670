"""A transformers model as `longlens.ops.observe.Observable`: it runs attached, and observers receive each call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from longlens.errors import InputError
from longlens.hf.attach import Attachment, attached_method
from longlens.hf.modules import attention_modules, inner_models
from longlens.hf.subscription import Subscription
from longlens.ops.method import Method
from longlens.ops.observe import Observer


class ObservedModel:
    """A model of transformers, or a module that contains some, for observers.

    Layers are numbered by their modules, since not every model passes its attention the number of the layer.
    """

    def __init__(self, model: nn.Module) -> None:
        if next(inner_models(model), None) is None:
            raise InputError(f"expected a transformers model, got {type(model).__name__}")
        self.model = model

    def attentions(self) -> Sequence[str]:
        """Names of the attention modules."""
        return tuple(attention_modules(self.model))

    @contextmanager
    def observed(self, observer: Observer, method: Method | str | None = None) -> Iterator[None]:
        """Subscribe `observer`; the model runs by `method`, else as it is attached already, else by exact attention."""
        chosen = method if method is not None else attached_method(self.model) or "exact"
        subscription = Subscription(self.model, observer)
        with Attachment(self.model, chosen, [subscription]), subscription.observing():
            yield
