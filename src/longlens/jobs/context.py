"""Which stretches of a sequence carried a prediction, measured by the prediction's error: the steps for one sequence.

    surprise    of the target, with everything in sight
    estimate    what hiding each key, and each stretch, would change, to first order (`longlens.lens.deletion`)
    exact       the strongest stretches by that estimate are hidden in truth, and the surprise is computed again
    halves      the strongest of these is halved, and its stronger half again, down to one token
    curve       surprise against the context that the model is given (`curve_pieces`)

The exact values decide; the estimate says where to look, and is never reported without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError
from longlens.jobs.context_regions import hidden_from
from longlens.lens.deletion import Hideable, Passes, Span

# tokens of the curve's smallest piece, in sequences of up to SHORT tokens and in longer ones
LEAST, LEAST_LONG, SHORT = 16, 64, 1024


@dataclass(frozen=True)
class ContextOptions:
    """The options of a context job.

    `targets`: words of `longlens.jobs.context_regions`, or None: the `most` most surprising tokens. `spans`: a width,
    ranges, or None for a width by the length. `exact`: stretches that are hidden in truth, the strongest first, for
    each target; None for all. `halve`: how many of them are halved. `curve`: tokens that the curve is computed for.
    """

    targets: tuple[str, ...] | None = None
    most: int = 4
    spans: int | tuple[Span, ...] | None = None
    exact: int | None = 8
    halve: int = 1
    curve: int = 64
    budget: int = 16_384
    figures: bool = True

    def __post_init__(self) -> None:
        # by the names that `longlens.context` has for them
        given = {
            "most_surprising": (self.most, 1), "exact": (self.exact, 1), "halve": (self.halve, 0),
            "curve": (self.curve, 0), "tokens_per_batch": (self.budget, 1),
        }  # fmt: skip
        for name, (value, least) in given.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"expected {name} as a whole number of at least {least}, got {value!r}")

    def described(self) -> dict[str, Any]:
        """The options as plain JSON."""
        fields = asdict(self)
        return {**fields, "spans": list(map(list, self.spans)) if isinstance(self.spans, tuple) else self.spans}


@dataclass(frozen=True)
class SpanEffect:
    """The effect of hiding a stretch on a target, in nats of surprise: to first order, and exact (NaN: not computed).

    `halvings`: how often a stretch was halved to get this one. Above 0: hiding makes the target more surprising, so
    that the stretch carried the prediction. `undefined`: nothing to predict from is left without the stretch
    (`Hideable.leaves_no_key`), so that both effects are NaN.
    """

    span: Span
    estimate: float
    exact: float
    halvings: int = 0
    undefined: bool = False


@dataclass(frozen=True)
class TargetContext:
    """What carried the prediction of one token: its surprise, the effect of each key (N,) to first order, of spans."""

    target: int
    surprise: float
    keys: NDArray[np.float64]
    effects: tuple[SpanEffect, ...]


def target_context(subject: Hideable, target: int, spans: Sequence[Span], options: ContextOptions) -> TargetContext:
    """Surprise, estimate, exact values of the strongest stretches and of halves, for one target."""
    able = hidden_from(subject, target, spans)
    spans = [span for span in able if not subject.leaves_no_key(target, span)]
    estimate = subject.estimate([target], spans)
    of_spans = estimate.spans[0]
    order = np.argsort(-np.abs(of_spans), kind="stable")[: options.exact]
    read = subject.surprise([target] * (1 + len(order)), [None, *(spans[place] for place in order)])
    base = float(read[0])
    exact = np.full(len(spans), np.nan)
    exact[order] = read[1:] - base
    found = {
        span: SpanEffect(span, *numbers)
        for span, *numbers in zip(spans, of_spans.tolist(), exact.tolist(), strict=True)
    }
    effects = [found.get(span, SpanEffect(span, math.nan, math.nan, undefined=True)) for span in able]
    strongest = sorted(order.tolist(), key=lambda place: -abs(exact[place]))[: options.halve]
    for place in strongest:
        effects += _halved(subject, target, base, found[spans[place]], estimate.keys[0])
    return TargetContext(target, base, estimate.keys[0], tuple(effects))


def _halved(
    subject: Hideable, target: int, base: float, effect: SpanEffect, keys: NDArray[np.float64]
) -> list[SpanEffect]:
    """Both halves of a stretch, then both halves of the one whose exact effect is the stronger in the same direction,
    down to one token. The estimate of a half is the linear form."""
    out, sign = [], math.copysign(1.0, effect.exact)
    while effect.span[1] - effect.span[0] > 1:
        start, stop = effect.span
        middle = (start + stop) // 2
        halves = hidden_from(subject, target, [(start, middle), (middle, stop)])
        if not halves:
            break
        read = subject.surprise([target] * len(halves), halves) - base
        found = [
            SpanEffect(half, _linear(keys, half, target), float(exact), effect.halvings + 1)
            for half, exact in zip(halves, read, strict=True)
        ]
        out += found
        effect = max(found, key=lambda half: sign * half.exact)
    return out


def _linear(keys: NDArray[np.float64], span: Span, target: int) -> float:
    """The sum of a span's keys, without the target's own, which stays in sight."""
    own = float(keys[target]) if span[0] <= target < span[1] else 0.0
    return float(keys[slice(*span)].sum()) - own


def most_surprising(surprise: NDArray[np.float64], count: int) -> list[int]:
    """The tokens of largest surprise, in order; NaN is none. Of equal ones the first."""
    order = np.argsort(-np.nan_to_num(surprise, nan=-np.inf), kind="stable")
    return [int(token) for token in order[:count] if np.isfinite(surprise[token])]


# ---- the curve


def curve_lengths(tokens: int) -> list[int]:
    """Lengths of the pieces: 16 (64 in sequences of more than 1,024 tokens), doubled, and the whole last."""
    length = LEAST if tokens <= SHORT else LEAST_LONG
    out = []
    while length < tokens:
        out.append(length)
        length *= 2
    return [*out, tokens]


def curve_pieces(targets: Sequence[int], tokens: int, length: int, *, causal: bool) -> list[Span]:
    """For each target the piece of `length` tokens that shows it most, of two cuts of the sequence.

    The second cut is shifted by half a piece, so that a token has at least half of the length before it (`causal`), or
    a quarter on either side, except near the ends of the sequence.
    """
    out = []
    for target in targets:
        pieces = []
        for shift in (0, length // 2):
            start = (target + shift) // length * length - shift
            pieces.append((max(0, start), min(tokens, start + length)))

        def room(piece: Span, target: int = target) -> tuple[int, int]:
            start, stop = piece
            before, after = target - start, stop - 1 - target
            # an end of the sequence cuts nothing off
            open_ends = [before if start else tokens, after if stop < tokens else tokens]
            return (before, 0) if causal else (min(open_ends), stop - start)

        out.append(max(pieces, key=room))
    return out


def curve_targets(subject: Hideable, count: int) -> list[int]:
    """At most `count` tokens, evenly spaced over those that are not special (and, under causality, not the first)."""
    able = [place for place in range(int(subject.causal), len(subject.labels)) if not subject.special[place]]
    if count >= len(able):
        return able
    places: list[int] = np.unique(np.linspace(0, len(able) - 1, count).round().astype(int)).tolist() if count else []
    return [able[place] for place in places]


def context_curve(subject: Hideable, targets: Sequence[int]) -> dict[int, NDArray[np.float64]]:
    """Surprise (T,) of each target where the model is given pieces of c tokens, for each c of `curve_lengths`."""
    tokens = len(subject.labels)
    return {
        length: subject.in_pieces(targets, curve_pieces(targets, tokens, length, causal=subject.causal))
        for length in curve_lengths(tokens)
    }


# ---- cost


def predicted_passes(
    tokens: int, residues: int, targets: int, spans: Sequence[Span], options: ContextOptions, *, causal: bool
) -> Passes:
    """The most passes that one sequence takes; fewer where a stretch lies behind a target, or is the target alone."""
    exact = len(spans) if options.exact is None else min(options.exact, len(spans))
    widths = sorted((stop - start for start, stop in spans), reverse=True)
    halves = sum(2 * math.ceil(math.log2(width)) for width in widths[: min(options.halve, exact)])
    choosing = residues if options.targets is None else 0
    on_curve = min(options.curve, residues)
    # a causal model reads each piece of both cuts once, for all tokens in it
    each = [min(on_curve * length, 2 * tokens) if causal else on_curve * length for length in curve_lengths(tokens)]
    pieces = sum(each) if on_curve else 0
    if causal:
        choosing = min(choosing, 1)
    return Passes(choosing + targets * (2 + exact + halves), targets, pieces)
