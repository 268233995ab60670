"""Look at what a model does while it runs: `watch`, `record`, `observe`, `trajectories`.

    with longlens.watch(model, collect=[Entropy(), Received()]) as seen:
        model(**inputs)

Each takes our models, transformers' models, and whatever else is `longlens.ops.observe.Observable`. This module stands
above `longlens.models` and `longlens.hf`, so that neither the lens nor our models need to know of transformers.
Before and after, the model is what it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longlens.errors import InputError
from longlens.hf.modules import inner_models
from longlens.hf.observe import ObservedModel
from longlens.hf.trajectories import trajectories_transformers
from longlens.lens.across import CallRecorder
from longlens.lens.collect.collector import Collector, by_name
from longlens.lens.predict.logit_lens import Reading, Trajectories, TrajectoryObserver
from longlens.lens.watch import STANDARD, Seen, WatchObserver, chosen_layers
from longlens.models.language_model import MaskedLM
from longlens.ops.method import Method
from longlens.ops.observe import Observable, Observer

T = TypeVar("T")


def watch(
    model: nn.Module,
    collect: Sequence[Collector] = STANDARD,
    *,
    layers: Collection[int] | None = None,
    heads: Sequence[int] | None = None,
    method: Method | str | None = None,
) -> AbstractContextManager[Seen]:
    """A context manager that gives a `Seen`, which fills while the model runs inside it.

    Several threads may run the model at a time; each call stands in `seen.calls` when it has ended.

    Args:
        model: `longlens.load(...)` or its encoder, or a transformers model that `longlens.hf.attach` serves.
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
    source = observable(model)
    names = source.attentions()
    seen = Seen(collect, names)
    return _observing(source, WatchObserver(seen, collect, chosen_layers(layers, len(names)), heads), method, seen)


def record(model: nn.Module, *, method: Method | str | None = None) -> AbstractContextManager[CallRecorder]:
    """A context manager that gives the attention calls of the model's last forward pass inside it, first layer to last.

        with longlens.record(model) as calls:
            model(**inputs).logits[0, 5, 7].backward()         # the gradient is for `relevance` alone
        longlens.lens.rollout(calls, queries=[5])
        longlens.lens.relevance(calls, queries=[5])

    Holds queries, keys and values of all layers. Arguments and errors as `watch`.
    """
    recorder = CallRecorder()
    return _observing(observable(model), recorder, method, recorder)


def observe(
    model: nn.Module, observer: Observer, *, method: Method | str | None = None
) -> AbstractContextManager[Observer]:
    """Tell an observer of your own (`longlens.ops.observe`) what the model's attentions do, inside a `with`."""
    return _observing(observable(model), observer, method, observer)


def observable(model: nn.Module) -> Observable:
    """`model`, or the only model inside it, as observers subscribe to it. Raises `InputError` for any other."""
    if isinstance(model, Observable):
        return model
    if next(inner_models(model), None) is not None:
        return ObservedModel(model)
    inside = [module for module in model.modules() if isinstance(module, Observable)]
    if len(inside) != 1:
        raise InputError(
            f"expected a model of longlens or of transformers, got {type(model).__name__} with {len(inside)} of them "
            "inside; for others call longlens.scan on their queries and keys"
        )
    return inside[0]


@contextmanager
def _observing(source: Observable, observer: Observer, method: Method | str | None, result: T) -> Iterator[T]:
    with source.observed(observer, method):
        yield result


def trajectories(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None = None,
    *,
    top: int = 5,
    layers: Collection[int] | None = None,
    chunk: int | None = None,
) -> Trajectories:
    """What each layer predicts for each token; `longlens.lens.predict.logit_lens` says how.

    Args:
        model: `longlens.load(...)`, or a language model of transformers that `longlens.hf.trajectories` names.
        inputs: what `model.pack` gives; for transformers the mapping that the model is called with (`input_ids`,
            `attention_mask`, ...), where padded tokens are left out.
        targets: token numbers of the shape of the inputs' tokens, -100 where there is none; no surprise where None.
        top: how many of the likeliest tokens to keep.
        layers: which layers, 0 (the embedding) to L, negative from the end; all where None.
        chunk: tokens at a time, as in `predictions`.

    Raises:
        InputError: targets or layers that do not fit, a model without a head that is known.
        UnsupportedError: a model of transformers that is not served.
    """
    if next(inner_models(model), None) is not None:
        return trajectories_transformers(model, inputs, targets, top=top, layers=layers, chunk=chunk)
    if not isinstance(model, MaskedLM):
        raise InputError(
            f"expected a masked language model of longlens or a language model of transformers, got "
            f"{type(model).__name__}; for others call longlens.lens.predictions on their hidden vectors"
        )
    if targets is not None and targets.shape != inputs.tokens.shape:
        raise InputError(f"expected targets {tuple(inputs.tokens.shape)}, got {tuple(targets.shape)}")
    bounds = inputs.cu_seqlens.long()
    lengths = bounds.diff()
    number = torch.arange(len(lengths), device=bounds.device).repeat_interleave(lengths)
    position = torch.arange(int(bounds[-1]), device=bounds.device) - bounds[:-1].repeat_interleave(lengths)
    reading = Reading(model.logits, targets, torch.stack([number, position], 1), top, chunk)
    norm = model.encoder.norm if model.config.pre_norm else None
    observer = TrajectoryObserver(reading, norm, model.config.layers, layers)
    with torch.no_grad():
        model(inputs, observers=[observer])
    return observer.trajectories()
