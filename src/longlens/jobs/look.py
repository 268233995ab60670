"""What a model attends to in one sequence: options and profile. `look_job` is the job over many sequences."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longlens.errors import InputError, UnsupportedError
from longlens.hf.texts import TextModel, TokenizedText
from longlens.io.alphabet import chain_breaks
from longlens.jobs.plan import BatchOutputs, batch_bytes
from longlens.lens.calls import check_heads
from longlens.lens.predict.vocabulary import Predictions
from longlens.lens.profile import Profile, TokenLabels, collectors, profile
from longlens.lens.watch import chosen_layers
from longlens.models.language_model import MaskedLM
from longlens.ops.registry import parse_method
from longlens.report import figures
from longlens.watching import trajectories, watch

# the tiles of a scan, over heads, and what is made of them
SCANNING = 2**26
# matplotlib, and its pictures
FIGURES = 2**26
STANDARD = ("entropy", "distance", "received", "neighbours", "top_keys", "top_queries", "pooled", "surprise")


@dataclass(frozen=True)
class LookOptions:
    """The options of a look. `layers` and `heads` count from 0, None means all; `collect` has names of
    `longlens.lens.profile.collectors`, and "surprise"; None is `STANDARD`, with surprise if the model can predict.

    `tokens` are the tokens whose partners are shown, `maps` the (layer, head) whose maps are shown; if empty, they are
    chosen automatically. `pool`: cells along a map; `links`: partners kept for each token and head.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    collect: tuple[str, ...] | None = None
    tokens: tuple[int, ...] = ()
    maps: tuple[tuple[int, int], ...] = ()
    pool: int = 256
    links: int = 8
    method: str = "exact"
    figures: bool = True

    def __post_init__(self) -> None:
        parse_method(self.method)
        collectors(self.of_attention, self.pool, self.links)
        if self.links < 1:
            raise InputError(f"expected to keep at least 1 partner, got {self.links}")
        if self.figures:
            figures.require_matplotlib()

    @property
    def of_attention(self) -> list[str]:
        """The names of the attention statistics to collect."""
        return [name for name in self.collect or STANDARD if name != "surprise"]

    @property
    def surprise(self) -> bool:
        """Whether surprise is computed too."""
        return "surprise" in (self.collect or STANDARD)

    def resolved(self, layers: int, heads: int, *, predicts: bool, model: str) -> LookOptions:
        """The same options for a model of so many layers and heads, with all defaults filled in.

        Raises `InputError` for layers, heads or maps that the model does not have, `UnsupportedError` for surprise of a
        model without a language model's head.
        """
        check_heads(self.heads, heads)
        chosen = tuple(sorted(chosen_layers(self.layers, layers)))
        shown = tuple(dict.fromkeys(range(heads) if self.heads is None else self.heads))
        if self.collect is None:
            collect = tuple(name for name in STANDARD if predicts or name != "surprise")
        elif "surprise" in self.collect and not predicts:
            raise UnsupportedError(f"surprise: {model} has no head of a language model; leave it out of --collect")
        else:
            collect = tuple(sorted(set(self.collect)))
        maps = tuple((layer % layers if -layers <= layer < layers else layer, head) for layer, head in self.maps)
        unknown = [f"{layer}.{head}" for layer, head in maps if layer not in chosen or head not in shown]
        if unknown:
            raise InputError(f"expected maps of the chosen layers and heads, got {', '.join(unknown)}")
        fields = {**asdict(self), "layers": chosen, "heads": shown, "collect": collect, "maps": maps}
        return LookOptions(**fields)


def protein_options(model: MaskedLM, options: LookOptions) -> LookOptions:
    """`options` with all defaults filled in for a model of proteins."""
    return options.resolved(model.config.layers, model.config.heads, predicts=model.predicts, model=model.source)


def text_options(model: TextModel, options: LookOptions) -> LookOptions:
    """`options` with all defaults filled in for a model of text."""
    return options.resolved(model.layers, model.heads, predicts=model.predicts, model=model.name)


def protein_bytes(model: MaskedLM, tokens: int, options: LookOptions) -> int:
    """Predicted peak growth of memory, in bytes, of a protein's profile and its files; `options`: `protein_options`."""
    config = model.config
    outputs = BatchOutputs(0, 1)
    passing = batch_bytes(config, tokens, model.dtype.itemsize, outputs)
    return passing + _profile_bytes(tokens, config.heads, config.head_width, options)


def text_bytes(model: TextModel, tokens: int, options: LookOptions) -> int:
    """The same of a text; `options`: `text_options`."""
    config: Any = model.model.config
    element = next(model.model.parameters()).element_size()
    width = config.hidden_size
    feeding = 3 * (getattr(config, "intermediate_size", None) or 4 * width)
    # a model with a head that is run without surprise makes its logits too
    predicting = 0 if options.surprise or not model.predicts else 2 * config.vocab_size
    passing = tokens * element * (2 * width + max(6 * width, feeding, predicting))
    return passing + _profile_bytes(tokens, model.heads, width // model.heads, options)


def _profile_bytes(tokens: int, heads: int, head_width: int, options: LookOptions) -> int:
    """Bytes of the statistics of all layers, of a layer's scan, and of what writing them takes."""
    assert options.layers is not None
    assert options.heads is not None
    rows = len(options.heads) * tokens
    names = options.of_attention
    links = sum(name in ("top_keys", "top_queries") for name in names) * options.links
    numbers = sum(name not in ("top_keys", "top_queries", "pooled", "neighbours") for name in names)
    maps = min(options.pool, tokens) ** 2 * len(options.heads) if "pooled" in names else 0
    # each statistic is held as it was collected and as the profile has it
    held = 2 * len(options.layers) * (rows * (4 * numbers + 12 * links) + 4 * maps)
    scanning = SCANNING + heads * tokens * head_width * 8
    writing = rows * (16 * numbers + 64 * options.links)
    return held + max(scanning, writing) + (FIGURES if options.figures else 0)


def refuse_tokens(options: LookOptions, count: int, name: str) -> None:
    """Raise `InputError` for tokens that a sequence of `count` tokens does not have."""
    unknown = [token for token in options.tokens if not 0 <= token < count]
    if unknown:
        raise InputError(f"{name}: expected tokens of 0..{count - 1}, got {', '.join(map(str, unknown))}")


def look_at_protein(model: MaskedLM, sequence: str, options: LookOptions, *, title: str, name: str) -> Profile:
    """The profile of one cleaned protein; `options` come from `protein_options`."""
    packed = model.pack([sequence])
    numbers = packed.tokens.tolist()
    special = np.ones(len(numbers), bool)
    special[model.alphabet.residues(len(numbers))] = chain_breaks(sequence)
    tokens = TokenLabels(title, tuple(model.alphabet.tokens[number] for number in numbers), special, residues=True)

    def read() -> Predictions | None:
        if not options.surprise:
            model(packed)
            return None
        return trajectories(model, packed, packed.tokens, top=0, layers=[-1])[model.config.layers]

    return _see(model, tokens, options, name, read)


def look_at_text(model: TextModel, text: TokenizedText, options: LookOptions, *, title: str, name: str) -> Profile:
    """The profile of one text; `options` come from `text_options`."""
    tokens = TokenLabels(title, text.labels, np.array(text.special), residues=False)

    def read() -> Predictions | None:
        return model.read(text, predict=options.surprise)

    return _see(model.model, tokens, options, name, read)


def _see(
    model: Any, tokens: TokenLabels, options: LookOptions, name: str, read: Callable[[], Predictions | None]
) -> Profile:
    """Run `read` once while the model is watched."""
    assert options.layers is not None
    assert options.heads is not None
    collect = collectors(options.of_attention, options.pool, options.links)
    with (
        torch.no_grad(),
        watch(model, collect, layers=options.layers, heads=options.heads, method=options.method) as seen,
    ):
        predictions = read()
    return profile(seen, name, tokens, options.heads, _predicted(predictions, tokens.special))


def _predicted(predictions: Predictions | None, special: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """(N,) each: surprise, its expectation (the entropy), rank from 1; NaN and 0 at special tokens."""
    if predictions is None:
        return {}
    assert predictions.surprise is not None
    assert predictions.rank is not None
    surprise, expected = (tensor.float().cpu().numpy() for tensor in (predictions.surprise, predictions.entropy))
    nothing = special | np.isnan(surprise)
    return {
        "surprise": np.where(nothing, np.nan, surprise).astype(np.float32),
        "expected": np.where(nothing, np.nan, expected).astype(np.float32),
        "rank": np.where(nothing, 0, predictions.rank.cpu().numpy()),
    }


def folder_name(name: str, number: int, width: int) -> str:
    """A folder name that is valid on every system and unique to the record."""
    safe = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._")[:60]
    return f"{number:0{width}d}_{safe}".rstrip("_")
