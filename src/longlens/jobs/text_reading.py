"""How a language model reads a text: at once or in windows, with which special tokens, each token masked or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from longlens.errors import InputError
from longlens.hf.documents import Document, Window, read_document, windows
from longlens.hf.language_heads import LanguageHead, language_head, rope_warning
from longlens.hf.surprise import MLP_CHUNK
from longlens.hf.texts import TextModel
from longlens.jobs.progress import Notice, ProgressCallback, StageProgress
from longlens.jobs.runner import Unit
from longlens.lens.predict.vocabulary import HELD

MASKING = ("masked", "in-place")
MADE = {"masked": "each token masked in turn", "in-place": "in place: the model sees the token"}
# tokens of windows, or of masked copies, at a time
BUDGET = 16_384
# (T, d) tensors that a pass holds at its peak: the stream, its norm, queries, keys and values twice, the output twice
HELD_WIDTHS = 12
# blocks of logits, and their temporaries
HELD_LOGITS = 6


@dataclass(frozen=True)
class TextReading:
    """A text and how a model reads it. `masking` is None for a causal model; `context` (tokens of a window, with
    special ones) and `stride` are None for the whole text at once."""

    model: TextModel
    head: LanguageHead
    document: Document
    context: int | None
    stride: int | None
    masking: str | None

    @cached_property
    def windows(self) -> list[Window]:
        """The windows of the text; one where the whole is read at once."""
        count = len(self.document)
        size = count if self.context is None else self.context - self._special
        return windows(count, size, size if self.stride is None else self.stride, causal=self.head.causal)

    @property
    def _special(self) -> int:
        return len(self.document.before) + len(self.document.after)

    @property
    def length(self) -> int:
        """Tokens of a window, with special ones."""
        return self.windows[0].stop - self.windows[0].start + self._special

    def units(self, stage: str) -> Iterator[Unit]:
        """Units of work, `start`..`stop`: of windows, or of tokens where each is masked in turn."""
        total, done = len(self.document), 0
        for start, stop in self._parts():
            last = stop if self.masking == "masked" else self.windows[stop - 1].last
            done = max(done, last)
            yield Unit(0, 1, StageProgress(stage, done, total, "tokens"), start, stop)

    def _parts(self) -> Iterator[tuple[int, int]]:
        size = max(1, BUDGET // self.length)
        if self.masking != "masked":
            yield from ((at, min(at + size, len(self.windows))) for at in range(0, len(self.windows), size))
            return
        for window in self.windows:
            yield from ((at, min(at + size, window.last)) for at in range(window.first, window.last, size))

    def window_of(self, token: int) -> Window:
        """The window from which a token has its surprise."""
        return next(window for window in self.windows if window.first <= token < window.last)

    @property
    def bytes(self) -> int:
        """Predicted growth of memory by the largest unit."""
        at_once = self.length * (1 if self.masking == "masked" else len(self.windows))
        tokens = max(self.length, BUDGET if self.masking == "masked" else min(BUDGET, at_once))
        weight = self.head.head.weight
        config: Any = self.model.model.config
        wide = 3 * (getattr(config, "intermediate_size", None) or 4 * weight.shape[1])
        passing = HELD_WIDTHS * tokens * weight.shape[1] + min(tokens, MLP_CHUNK) * wide
        return passing * weight.element_size() + HELD_LOGITS * 4 * HELD

    @property
    def options(self) -> dict[str, Any]:
        """What decides the numbers, beside model and text, as plain JSON."""
        special = [list(self.document.before), list(self.document.after)]
        return {"context": self.context, "stride": self.stride, "masking": self.masking, "special": special}

    def described(self) -> dict[str, Any]:
        """How the numbers are made, in words."""
        around = list(self.document.before + self.document.after)
        names = " ".join(map(str, self.model.tokenizer.convert_ids_to_tokens(around))) if around else "none"
        several = len(self.windows) > 1
        return {
            "kind": "causal" if self.head.causal else f"masked model, {MADE[self.masking or 'masked']}",
            "special_tokens": names, "context": self.context if several else "whole text",
            "stride": self.stride if several else None,
        }  # fmt: skip

    def announce(self, progress: ProgressCallback) -> None:
        """Warn of a rope that depends on the text's length, and tell how many passes masking takes."""
        warning = rope_warning(self.model.model.config, self.length)
        # windows of one length have one set of frequencies
        if warning is not None and len(self.windows) == 1:
            progress(Notice(warning, warning=True))
        if self.masking == "masked":
            count = len(self.document)
            progress(Notice(f"each of {count:,} tokens is masked in a copy of its window of {self.length:,} tokens"))


def check_windows(context: int | None, stride: int | None) -> None:
    """Raise `InputError` unless both or neither are given, as numbers of tokens."""
    if (context is None) != (stride is None):
        raise InputError("expected --context and --stride together: tokens of a window, and from one to the next")
    for name, number in (("context", context), ("stride", stride)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise InputError(f"expected --{name} as a number of tokens of at least 1, got {number!r}")


def read_text_with(
    model: TextModel,
    text: str,
    name: str,
    *,
    context: int | None,
    stride: int | None,
    bos: bool | None,
    masking: str | None,
) -> TextReading:
    """The text as the model reads it; `name` of its file.

    Raises `InputError` for a model without a head, a text beyond its positions or with no token that can be predicted,
    a window too small for its stride, and options of the other kind of model; `UnsupportedError` for a head that
    longlens does not know.
    """
    head = language_head(model.model)
    masking = _masking(model, head, masking, bos)
    document = read_document(model, text, name, causal=head.causal, bos=bos)
    refuse_unpredictable(model, document, name, causal=head.causal)
    _refuse_over_positions(model, document, context, name)
    _refuse_small_context(document, context, stride, name)
    return TextReading(model, head, document, context, stride, masking)


def _masking(model: TextModel, head: LanguageHead, masking: str | None, bos: bool | None) -> str | None:
    if masking not in (*MASKING, None):
        raise InputError(f"expected masking of {', '.join(MASKING)}, got {masking!r}")
    if head.causal:
        if masking is not None:
            raise InputError(
                f"{model.name} is a causal model, which predicts each token from those before it: leave out --surprise"
            )
        return None
    if bos is not None:
        raise InputError(
            f"{model.name} is a masked model, which gets its tokenizer's special tokens: leave out --bos and --no-bos"
        )
    if masking != "in-place" and model.tokenizer.mask_token_id is None:
        raise InputError(f"{model.name}: its tokenizer has no mask token; ask for --surprise in-place")
    return masking or "masked"


def refuse_unpredictable(model: TextModel, document: Document, name: str, *, causal: bool) -> None:
    """Raise `InputError` for a text of one token, where a causal model gets nothing before it."""
    if not causal or document.before or len(document) > 1:
        return
    advice = "give a longer text"
    if model.tokenizer.bos_token_id is not None:
        advice += ", or let the model have its start token: leave out --no-bos"
    raise InputError(
        f"{name}: expected a text of at least 2 tokens, since {model.name} gets no start token and predicts each token "
        f"from those before it, got 1 token ({document.text!r}), of which nothing can be predicted; {advice}"
    )


def _refuse_over_positions(model: TextModel, document: Document, context: int | None, name: str) -> None:
    count = len(document) + len(document.before) + len(document.after)
    tokens = count if context is None else min(context, count)
    if model.longest is None or tokens <= model.longest:
        return
    if context is None:
        raise InputError(
            f"{name}: expected at most {model.longest:,} tokens, as many as {model.name} has positions, got {count:,}; "
            f"read it in windows, --context {model.longest} --stride {max(1, model.longest // 2)}, or give a model "
            "with more positions"
        )
    raise InputError(
        f"expected a --context of at most {model.longest:,} tokens, as many as {model.name} has positions, got "
        f"{context:,}"
    )


def _refuse_small_context(document: Document, context: int | None, stride: int | None, name: str) -> None:
    if context is None or stride is None:
        return
    around = len(document.before) + len(document.after)
    least = stride + around + (0 if around else 1)
    if context < least:
        raise InputError(
            f"{name}: expected a --context of at least {least} tokens for a --stride of {stride}, since {around} of "
            f"each window are special tokens and every token needs one before it, got {context}"
        )
