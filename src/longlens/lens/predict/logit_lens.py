"""The logit lens: what each layer would predict if it were the last (nostalgebraist 2020, "interpreting GPT: the logit
lens").

The residual stream after each layer goes through the model's final norm and head, which were trained for the last layer
alone: early layers may hold what the head cannot read. The last layer's row is the model's own prediction.

    path = trajectories(model, model.pack(["MKTAYIAKQRQISFVKSHFSRQ"]), tokens)
    path[3].surprise                                           # (T,), layer 3; 0 is the embedding, L the last
    path.to_frame()                                            # layer, batch, token, ...

Each layer is read while the model runs, a chunk of tokens at a time: neither (T, V) nor all layers' vectors are held.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from longlens.errors import InputError
from longlens.lens.predict.vocabulary import Head, Predictions, predictions
from longlens.lens.statistic import Layered, Statistic
from longlens.lens.watch import chosen_layers
from longlens.report import statistics

if TYPE_CHECKING:
    from longlens.report.figures import Axes

# who reads models that are not ours: the module that a class of the model's comes from, and where the reader lives
GUESTS: Mapping[str, str] = {"transformers": "longlens.hf.trajectories:trajectories_transformers"}


@dataclass(frozen=True, repr=False)
class Trajectories(Layered):
    """`Predictions` of each layer: `path[layer]`, 0 the embedding, L the last layer."""

    results: Mapping[int, Predictions]

    def draw(self, ax: Axes) -> None:
        """Surprise (entropy where there are no targets) of batch row 0: layers upwards, tokens to the right."""
        what = "entropy" if any(found.surprise is None for found in self.results.values()) else "surprise"
        tables = [found.columns() for found in self.results.values()]
        first = tables[0]["batch"] == tables[0]["batch"][0]
        shown = np.stack([table[what][first] for table in tables])
        statistics.draw_layers(ax, shown, list(self.results), what)

    def plot(self, ax: Axes | None = None) -> Any:
        """All layers on one axes; returns it. Needs matplotlib (extra `plot`)."""
        return Statistic.plot(self, ax)

    def _picture(self) -> str | None:
        return Statistic._picture(self)


def trajectories(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None = None,
    *,
    top: int = 5,
    layers: Collection[int] | None = None,
    chunk: int | None = None,
) -> Trajectories:
    """What each layer predicts for each token; the module's docstring says how.

    Args:
        model: `longlens.models.MaskedLM`, or a language model of transformers that `longlens.hf.trajectories` names.
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
    for base in type(model).__mro__:
        home = GUESTS.get(base.__module__.partition(".")[0])
        if home is not None:
            module, _, name = home.partition(":")
            return getattr(import_module(module), name)(model, inputs, targets, top=top, layers=layers, chunk=chunk)
    encoder, logits = getattr(model, "encoder", None), getattr(model, "logits", None)
    if not isinstance(encoder, nn.Module) or not callable(logits):
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
    reading = Reading(logits, targets, torch.stack([number, position], 1), top, chunk)
    blocks = list(encoder.get_submodule("layers").children())
    settings: Any = encoder.config
    norm = encoder.get_submodule("norm") if settings.pre_norm else None
    return read_layers(blocks, norm, reading, layers, lambda: model(inputs))


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


@torch.no_grad()
def read_layers(
    blocks: list[nn.Module],
    norm: Callable[[Tensor], Tensor] | None,
    reading: Reading,
    layers: Collection[int] | None,
    run: Callable[[], object],
) -> Trajectories:
    """Call `run`, which runs the layers `blocks` in order, and read the stream before the first and after each."""
    wanted = chosen_layers(layers, len(blocks) + 1)
    found: dict[int, Predictions] = {}

    def before(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        found[0] = reading(args[0] if args else given["hidden_states"], norm)

    def after(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            found[number] = reading(output if isinstance(output, Tensor) else output[0], norm)

        return read

    hooks = [blocks[layer - 1].register_forward_hook(after(layer)) for layer in wanted if layer]
    if 0 in wanted:
        hooks.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return Trajectories("predictions", dict(sorted(found.items())))
