"""Surprise of a text's tokens by a transformers model: attention in linear memory, logits a few rows at a time.

    head = language_head(model.model)
    document = read_document(model, text, "the text", causal=head.causal)
    with attach(model.model, mlp_chunk=MLP_CHUNK):
        read_windows(head, document, windows(len(document), len(document), len(document), causal=True))

A causal model predicts a token from those before it in the window. A masked model either sees the token itself ("in
place", one pass), or has it masked, one token at a time ("masked", a copy of the window for each token; Salazar et al.
2020, arXiv:1910.14659).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.hf.documents import Document, Window
from longlens.hf.language_heads import LanguageHead
from longlens.lens.predict.vocabulary import Predictions, predictions

# tokens at a time of the wide layers of a feed-forward part
MLP_CHUNK = 4096


@dataclass(frozen=True)
class TokenSurprise:
    """Of some tokens of a text, (n,) each: `token` numbers them, surprise, entropy and `variance` (of the surprise) are
    in nats, `rank` is from 1 (0 without a prediction), `seen` counts the tokens of the text that the model had.

    `begins`: log of the probability, before the token, of the set that was asked for; NaN where none was asked for.
    `end`: the same after the last token of the last window.
    """

    token: NDArray[np.int64]
    surprise: NDArray[np.float64]
    entropy: NDArray[np.float64]
    variance: NDArray[np.float64]
    rank: NDArray[np.int64]
    seen: NDArray[np.int64]
    begins: NDArray[np.float64]
    end: float


@dataclass(frozen=True)
class TokenVectors:
    """What the head gets for some tokens of a text: `hidden` (n, d), and `targets` (n,), the tokens themselves. `token`
    and `seen` (n,) as `TokenSurprise`; `without` (n,) bool: tokens without a prediction, whose row means nothing."""

    hidden: Tensor
    targets: Tensor
    token: NDArray[np.int64]
    seen: NDArray[np.int64]
    without: NDArray[np.bool_]


@torch.no_grad()
def window_vectors(
    head: LanguageHead, document: Document, batch: Sequence[Window], *, end: bool = False
) -> TokenVectors:
    """Run the model once over windows of equal length. `end`: `hidden` has one more row, (n + 1, d), that predicts what
    comes after the last token of the last window."""
    device = head.head.weight.device
    inputs = np.stack([document.inputs(window.start, window.stop) for window in batch])
    hidden = head.hidden(torch.from_numpy(inputs).to(device))
    lead, shift = len(document.before), 1 if head.causal else 0
    token = np.concatenate([np.arange(window.first, window.last) for window in batch])
    number = np.repeat(np.arange(len(batch)), [window.last - window.first for window in batch])
    start, stop = (np.array([getattr(window, name) for window in batch])[number] for name in ("start", "stop"))
    place = lead + token - start - shift
    rows = number * inputs.shape[1] + np.maximum(place, 0)
    if end:
        rows = np.append(rows, len(batch) * inputs.shape[1] - len(document.after) - 1)
    targets = torch.from_numpy(document.ids[token]).to(device)
    seen = token - start if head.causal else stop - start - 1
    return TokenVectors(_take(hidden, torch.from_numpy(rows).to(device)), targets, token, seen, place < 0)


@torch.no_grad()
def masked_vectors(
    head: LanguageHead, document: Document, window: Window, first: int, last: int, mask: int, budget: int
) -> TokenVectors:
    """Tokens first..last of a window, each masked (token number `mask`) in a copy of the window; `budget`: tokens of
    copies at a time."""
    device = head.head.weight.device
    whole = torch.from_numpy(document.inputs(window.start, window.stop)).to(device)
    lead = len(document.before) - window.start
    kept = []
    step = max(1, budget // len(whole))
    for begin in range(first, last, step):
        places = torch.arange(begin, min(begin + step, last), device=device) + lead
        copies = whole.repeat(len(places), 1)
        each = torch.arange(len(places), device=device)
        copies[each, places] = mask
        kept.append(head.hidden(copies)[each, places])
    token = np.arange(first, last)
    targets = torch.from_numpy(document.ids[token]).to(device)
    seen = np.full(len(token), window.stop - window.start - 1)
    return TokenVectors(torch.cat(kept), targets, token, seen, np.zeros(len(token), bool))


def read_windows(
    head: LanguageHead, document: Document, batch: Sequence[Window], *, group: Tensor | None = None
) -> TokenSurprise:
    """Run the model once over windows of equal length, and read each window's own tokens.

    `group` (V,) bool: a set of tokens (`Predictions.group`). The first token has no prediction where a causal model
    gets no start token: its numbers are NaN.
    """
    found = window_vectors(head, document, batch, end=True)
    predicted = predictions(
        found.hidden, head.head, torch.cat([found.targets, found.targets[-1:]]), top=0, variance=True,
        group=None if group is None else group.to(found.hidden.device),
    )  # fmt: skip
    return _as_arrays(predicted, found)


def read_masked(
    head: LanguageHead, document: Document, window: Window, first: int, last: int, mask: int, budget: int
) -> TokenSurprise:
    """The surprise of tokens first..last of a window, each masked in turn; arguments as `masked_vectors`."""
    found = masked_vectors(head, document, window, first, last, mask, budget)
    return _as_arrays(predictions(found.hidden, head.head, found.targets, top=0, variance=True), found)


def _take(hidden: Tensor, rows: Tensor) -> Tensor:
    """Rows of (B, N, d); a view where they are all in one stretch, so that a long text is not copied."""
    flat = hidden.flatten(0, 1)
    first, count = int(rows[0]), len(rows)
    if torch.equal(rows, torch.arange(first, first + count, device=rows.device)):
        return flat[first : first + count]
    return flat[rows]


def _as_arrays(predicted: Predictions, found: TokenVectors) -> TokenSurprise:
    count = len(found.token)

    def column(tensor: Tensor | None) -> NDArray[np.float64]:
        if tensor is None:
            return np.full(count, np.nan)
        return np.where(found.without, np.nan, tensor[:count].double().cpu().numpy())

    assert predicted.rank is not None
    rank = np.where(found.without, 0, predicted.rank[:count].cpu().numpy())
    group = predicted.group
    end = float("nan") if group is None or len(group) == count else float(group[-1])
    return TokenSurprise(
        found.token, column(predicted.surprise), column(predicted.entropy), column(predicted.variance), rank,
        found.seen, column(group), end,
    )  # fmt: skip
