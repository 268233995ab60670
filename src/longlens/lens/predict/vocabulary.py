"""What a model predicts for each token, in memory linear in the tokens: no (T, V) matrix.

For logits s (V,) of one token, p = softmax(s) and the target y:

    surprise = -log p_y                      nats
    entropy  = -sum_v p_v log p_v            the surprise that the model itself expects
    rank     = 1 + #{v : s_v > s_y}          1: the target is the first choice; equal logits share the better rank
    top      = the k likeliest tokens and their log p; the order among equal logits is not defined
    variance = sum_v p_v (log p_v)^2 - entropy^2       of the surprise, as the model itself expects it
    group    = log sum_{v in G} p_v    of a given set G of tokens

Tokens are walked in chunks, and a large vocabulary in blocks, as attention is over keys: with m the largest logit so
far, l = sum e^(s - m) and t = sum e^(s - m) (s - m) are rescaled when m moves (the online softmax of Milakov &
Gimelshein 2018, arXiv:1805.02867). Then surprise = log l + (m - s_y) and entropy = log l - t / l: sums of what is not
negative, so that nothing cancels. With u = sum e^(s - m) (s - m)^2, variance = u / l - (t / l)^2.

    predicted = predictions(hidden, model.logits, tokens)
    predicted.surprise, predicted.rank, predicted.top          # (T,), (T,), (T, k)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from longlens.errors import InputError
from longlens.lens.statistic import Statistic
from longlens.report import statistics

if TYPE_CHECKING:
    from longlens.report.figures import Axes

# logits held at a time; several tensors of that size are alive at once
HELD = 2**23
# fewer tokens at a time leave a matrix product waiting for the weights, so the vocabulary is divided instead
FEWEST = 32
MOST = 1024
# the target of a token that has none, as transformers writes it in its labels
NO_TARGET = -100
# e^x is 0 from here down in float32 and float64, and x e^x is not NaN, as it is at -inf
FLOOR = -1e4


@dataclass(frozen=True)
class Head:
    """A head whose last step is a matrix product, so that the vocabulary can be walked in blocks.

    logits = cap(transform(h) weight^T + bias), cap(s) = softcap tanh(s / softcap), or s where None; `weight` (V, f),
    `bias` (V,), `transform` (rows, d) -> (rows, f), the vectors themselves where None.
    """

    weight: Tensor
    bias: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """(rows, d) -> (rows, V)."""
        return self.block(self.features(hidden), slice(0, len(self.weight)))

    def features(self, hidden: Tensor) -> Tensor:
        """(rows, d) -> (rows, f)."""
        return hidden if self.transform is None else self.transform(hidden)

    def block(self, features: Tensor, tokens: slice) -> Tensor:
        """Logits (rows, W) of the tokens `tokens` of the vocabulary."""
        logits = F.linear(features, self.weight[tokens], None if self.bias is None else self.bias[tokens])
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True, repr=False)
class Predictions(Statistic):
    """Formulas: the module's docstring. One row for each of T tokens.

    `entropy` (T,), `top` (T, k) int64 and `top_log_probability` (T, k), likeliest first; `targets` (T,) int64,
    `surprise` (T,) and `rank` (T,) int64 where targets were given: NaN and 0 at tokens without one (-100). `places`
    (T, 2) int64: batch row (or sequence) and position of each token; None where the rows are one sequence. `variance`
    and `group` (T,) where they were asked for.
    """

    entropy: Tensor
    top: Tensor
    top_log_probability: Tensor
    targets: Tensor | None = None
    surprise: Tensor | None = None
    rank: Tensor | None = None
    places: Tensor | None = None
    variance: Tensor | None = None
    group: Tensor | None = None

    @property
    def standardised(self) -> Tensor | None:
        """(T,): excess / sqrt(variance), of mean 0 and variance 1 where the model is calibrated; NaN where the variance
        is 0."""
        if self.surprise is None or self.variance is None:
            return None
        return torch.where(self.variance > 0, (self.surprise - self.entropy) / self.variance.sqrt(), torch.nan)

    @property
    def excess(self) -> Tensor | None:
        """(T,): surprise - entropy, the error beyond what the model expected; 0 on average where it is calibrated."""
        return None if self.surprise is None else self.surprise - self.entropy

    def columns(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        """batch, token, what is known of the target, entropy, and top_1, log_probability_1, top_2, ..."""
        count = len(self.entropy[:rows])
        places = np.stack([np.zeros(count, np.int64), np.arange(count)], 1)
        places = places if self.places is None else _np(self.places[:rows])
        table = {"batch": places[:, 0], "token": places[:, 1]}
        for name in ("targets", "surprise", "rank"):
            if (tensor := getattr(self, name)) is not None:
                table[name.removesuffix("s")] = _np(tensor[:rows])
        for name in ("entropy", "variance", "group"):
            if (tensor := getattr(self, name)) is not None:
                table[name] = _np(tensor[:rows])
        for place in range(self.top.shape[1]):
            table[f"top_{place + 1}"] = _np(self.top[:rows, place])
            table[f"log_probability_{place + 1}"] = _np(self.top_log_probability[:rows, place])
        return table

    def draw(self, ax: Axes) -> None:
        """Entropy and, where there are targets, surprise along the tokens of batch row 0."""
        table = self.columns()
        first = table["batch"] == table["batch"][0] if len(self.entropy) else np.zeros(0, bool)
        lines: dict[str, NDArray[Any]] = {}
        for name in ("entropy", "surprise"):
            if name in table:
                lines[name] = table[name][first]
        statistics.draw_predictions(ax, table["token"][first], lines, self.name)

    @property
    def marks(self) -> int:
        """Points of a line."""
        return len(self.entropy)

    def _rows(self) -> int:
        return len(self.entropy)


@torch.no_grad()
def predictions(
    hidden: Tensor,
    head: Head | nn.Linear | Callable[[Tensor], Tensor],
    targets: Tensor | None = None,
    *,
    top: int = 5,
    chunk: int | None = None,
    block: int | None = None,
    places: Tensor | None = None,
    variance: bool = False,
    group: Tensor | None = None,
    name: str = "predictions",
) -> Predictions:
    """Surprise, entropy, rank and the likeliest tokens of each row of `hidden` (T, d).

    Args:
        hidden: what the head takes, (T, d); rows of a batch are laid end to end first (`flatten(0, 1)`).
        head: (rows, d) -> logits (rows, V), such as `model.logits`, or a `Head` (or `nn.Linear`), whose vocabulary is
            walked in blocks where it is large. Logits are read in float32, or float64 where they are that.
        targets: (T,) int64, the token that was to be predicted at each row; -100 where there is none. For a causal
            model row t predicts token t + 1: the caller shifts.
        top: how many of the likeliest tokens to keep; 0 keeps none, more than V keeps V.
        chunk: tokens at a time; so many that about 2^23 logits are held where None.
        block: vocabulary at a time, for a `Head`; the whole where None and 32 tokens of it fit. With several blocks and
            targets, the logits are computed twice, since a rank needs the target's logit first.
        places: `Predictions.places`.
        variance: also the variance of the surprise.
        group: (V,) bool, a set of tokens whose log-probability to compute.
        name: `Statistic.name`.

    Raises:
        InputError: shapes or dtypes that do not fit, targets beyond the vocabulary.
    """
    _check(hidden, targets, top, chunk, block)
    head = Head(head.weight, head.bias) if isinstance(head, nn.Linear) else head
    vocabulary, kind = _about(head, hidden)
    if group is not None and (group.shape != (vocabulary,) or group.dtype != torch.bool):
        raise InputError(f"expected group ({vocabulary},) of bool, got {group.dtype} {tuple(group.shape)}")
    if targets is not None:
        _check_targets(targets, vocabulary)
    if block is None:
        fits = vocabulary * FEWEST <= HELD or not isinstance(head, Head)
        block = vocabulary if fits else HELD // FEWEST
    elif not isinstance(head, Head):
        raise InputError("expected a Head (weight, bias, transform), whose logits come in blocks, got a function")
    chunk = chunk or min(max(HELD // max(block, 1), 1), MOST)
    spans = [slice(start, min(start + block, vocabulary)) for start in range(0, vocabulary, block)]
    columns = _empty(len(hidden), min(top, vocabulary), kind, targets, hidden.device)
    more = {"variance": variance, "group": group is not None}
    columns |= {key: torch.empty_like(columns["entropy"]) for key, asked in more.items() if asked}
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        wanted = None if targets is None else targets[rows]
        blocks = logit_blocks(head, hidden[rows], spans)
        for key, values in _of_chunk(blocks, spans, wanted, top, variance, group).items():
            columns[key][rows] = values
    return Predictions(name, targets=targets, places=places, **columns)


def logit_blocks(
    head: Head | Callable[[Tensor], Tensor], hidden: Tensor, spans: list[slice]
) -> Callable[[], Iterator[Tensor]]:
    """A function that computes the blocks of one chunk's logits, anew and with the same result at each call."""
    if not isinstance(head, Head):
        return lambda: iter([_wide(head(hidden))])
    features = head.features(hidden)
    return lambda: (_wide(head.block(features, span)) for span in spans)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _of_chunk(
    blocks: Callable[[], Iterator[Tensor]],
    spans: list[slice],
    targets: Tensor | None,
    top: int,
    variance: bool,
    group: Tensor | None,
) -> dict[str, Tensor]:
    """The fields of `Predictions` for one chunk of rows."""
    state: State | None = None
    for span, logits in zip(spans, blocks(), strict=True):
        state = state or State(logits, targets, top, variance, group)
        state.take_target(logits, span)
        if len(spans) == 1:
            state.count_larger(logits)
        state.add(logits, span)
    assert state is not None
    if targets is not None and len(spans) > 1:
        # a block's logits are compared with the target's as the same product gave it: equal ones are equal
        for logits in blocks():
            state.count_larger(logits)
    return state.fields()


class State:
    """Running sums over the blocks of the vocabulary for one chunk of rows; m, l, t, u as in the module's docstring."""

    def __init__(self, like: Tensor, targets: Tensor | None, top: int, variance: bool, group: Tensor | None) -> None:
        self.targets, self.top, self.variance, self.group = targets, top, variance, group
        # finite, so that a block of -inf alone changes nothing
        self.m = like.new_full((len(like),), torch.finfo(like.dtype).min)
        self.l, self.t, self.u, self.of_group = (torch.zeros_like(self.m, dtype=torch.float64) for _ in range(4))
        self.best = like.new_empty(len(like), 0)
        self.index = torch.empty(len(like), 0, dtype=torch.int64, device=like.device)
        self.of_target = torch.full_like(self.m, torch.nan)
        self.larger = torch.zeros(len(like), dtype=torch.int64, device=like.device)

    def take_target(self, logits: Tensor, span: slice) -> None:
        """Keep the target's logit where it is in this block."""
        if self.targets is None:
            return
        inside = (self.targets >= span.start) & (self.targets < span.stop)
        place = (self.targets - span.start).clamp(0, logits.shape[1] - 1)
        self.of_target = torch.where(inside, logits.gather(1, place.unsqueeze(1)).squeeze(1), self.of_target)

    def count_larger(self, logits: Tensor) -> None:
        if self.targets is not None:
            self.larger += (logits > self.of_target.unsqueeze(1)).sum(1)

    def add(self, logits: Tensor, span: slice) -> None:
        """Take in a block."""
        best, where = logits.topk(min(max(self.top, 1), logits.shape[1]))
        largest, its_place = best[:, :1], where[:, :1]
        if self.top:
            best, where = torch.cat([self.best, best], 1), torch.cat([self.index, where + span.start], 1)
            self.best, order = best.topk(min(self.top, best.shape[1]))
            self.index = where.gather(1, order)
        m = torch.maximum(self.m, largest.squeeze(1))
        moved = (self.m - m).clamp(min=FLOOR).double()
        scale = moved.exp()
        x = (logits - m.unsqueeze(1)).clamp_(min=FLOOR)
        e = x.exp()
        if self.group is not None:
            self.of_group = scale * self.of_group + e @ self.group[span].to(e.dtype)
        if self.variance:
            self.u = scale * (self.u + moved * (2 * self.t + moved * self.l)) + (x * x).mul_(e).sum(1)
        self.t = scale * (self.t + moved * self.l) + x.mul_(e).sum(1)
        # the largest apart: 1 + what is left of a sure prediction would be 1 in float32
        first = (largest.squeeze(1) - m).double().exp()
        self.l = scale * self.l + first + e.scatter_(1, its_place, 0.0).sum(1)
        self.m = m

    def fields(self) -> dict[str, Tensor]:
        """What `Predictions` holds."""
        log_l = self.l.log()
        columns = {
            "entropy": log_l - self.t / self.l,
            "top": self.index,
            "top_log_probability": (self.best - self.m.unsqueeze(1)) - log_l.unsqueeze(1),
        }
        if self.variance:
            columns["variance"] = (self.u / self.l - (self.t / self.l) ** 2).clamp(min=0.0)
        if self.group is not None:
            columns["group"] = self.of_group.log() - log_l
        if self.targets is not None:
            columns["surprise"] = log_l + (self.m - self.of_target)
            columns["rank"] = (self.larger + 1).masked_fill(self.targets == NO_TARGET, 0)
        return columns


def _about(head: Head | Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[int, torch.dtype]:
    """Size of the vocabulary, and the dtype of the statistics."""
    if isinstance(head, Head):
        logits = head.weight[:0]
        vocabulary = len(head.weight)
    else:
        logits = head(hidden[:1])
        if logits.ndim != 2 or len(logits) != len(hidden[:1]):
            raise InputError(f"expected a head from (rows, d) to (rows, V), got {tuple(logits.shape)} for one row")
        vocabulary = logits.shape[1]
    if vocabulary == 0:
        raise InputError("expected a vocabulary of at least one token, got none")
    return vocabulary, _wide(logits).dtype


def _empty(count: int, top: int, kind: torch.dtype, targets: Tensor | None, device: torch.device) -> dict[str, Tensor]:
    columns = {
        "entropy": torch.empty(count, dtype=kind, device=device),
        "top": torch.empty(count, top, dtype=torch.int64, device=device),
        "top_log_probability": torch.empty(count, top, dtype=kind, device=device),
    }
    if targets is not None:
        columns["surprise"] = torch.empty_like(columns["entropy"])
        columns["rank"] = torch.empty(count, dtype=torch.int64, device=device)
    return columns


def _check(hidden: Tensor, targets: Tensor | None, top: int, chunk: int | None, block: int | None) -> None:
    if hidden.ndim != 2:
        raise InputError(
            f"expected hidden vectors (T, d), got {tuple(hidden.shape)}; lay the rows of a batch end to end, "
            "hidden.flatten(0, 1)"
        )
    if top < 0 or any(size is not None and size < 1 for size in (chunk, block)):
        raise InputError(f"expected top of at least 0, chunk and block of at least 1, got {top}, {chunk}, {block}")
    if targets is not None and (targets.shape != hidden.shape[:1] or targets.dtype != torch.int64):
        raise InputError(f"expected targets ({len(hidden)},) of int64, got {targets.dtype} {tuple(targets.shape)}")


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    there = targets[targets != NO_TARGET]
    if len(there) and not 0 <= int(there.min()) <= int(there.max()) < vocabulary:
        raise InputError(
            f"expected targets in 0..{vocabulary - 1}, or {NO_TARGET} where there is none, got "
            f"{int(there.min())}..{int(there.max())}"
        )


def _np(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
