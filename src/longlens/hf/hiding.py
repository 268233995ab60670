"""One text and a language model of transformers, parts of which can be hidden (`longlens.lens.deletion.Hideable`).

Keys are hidden by a rule of the attention that the model is attached to, in every layer: an `attention_mask` of 0 would
make some models count positions anew (OPT), so that hiding would be deleting.

A masked model gets a copy of the text for each pair of a target and a span. A causal model reads the tokens before the
target once and keeps their keys and values. For a span S then only the tokens after S are computed again, at their own
positions, on the keys before S: the keys of S are not there, those before it do not depend on it, and nobody reads the
queries of S. Where this does not give the same (a sliding window counts keys, not positions), the whole is computed
again.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlens.errors import InputError
from longlens.hf.attach import Attachment
from longlens.hf.documents import Document
from longlens.hf.language_heads import LanguageHead
from longlens.hf.modules import attention_modules
from longlens.hf.observe import ObservedModel
from longlens.hf.surprise import MLP_CHUNK
from longlens.hf.texts import TextModel
from longlens.lens.deletion import DeletionSums, Estimate, Passes, Span
from longlens.lens.padded import scan_shape
from longlens.ops.observe import AttentionCall, ForwardObserver, Observer

# tokens on which the shared prefix is compared with hiding by a rule, and the span that is hidden
TRIED, TRIED_SPAN = 24, (9, 15)


@dataclass(frozen=True)
class _Prefix:
    """What a causal model computed for the tokens before a target: the cache of keys and values, and its surprise."""

    target: int
    cache: Any
    surprise: float


class TextContext:
    """A text and a model. Tokens count from 0, special ones included, as the model gets them.

    `budget`: tokens of copies that are computed at a time, at least one copy. `passes` counts what was computed.
    """

    def __init__(self, model: TextModel, head: LanguageHead, document: Document, budget: int = 16_384) -> None:
        self.model, self.head, self.document, self.budget = model, head, document, budget
        self.causal = head.causal
        self.ids = torch.from_numpy(document.inputs(0, len(document))).to(head.head.weight.device)
        around = model.tokenizer.convert_ids_to_tokens([*document.before, *document.after])
        first = len(document.before)
        self.labels: Sequence[str] = (*around[:first], *document.pieces, *around[first:])
        self.special = np.ones(len(self.labels), bool)
        self.special[first : first + len(document)] = False
        mask = model.tokenizer.mask_token_id
        if not self.causal and mask is None:
            raise InputError(f"{model.name}: expected a tokenizer with a mask token, got none; no token can be masked")
        self.mask = -1 if mask is None else int(mask)
        self.passes = Passes()
        modules = attention_modules(model.model).values()
        self._sinks = all(getattr(module, "sinks", None) is not None for module in modules)
        self.shares_prefix = self.causal and self._prefix_can_be_shared()
        self._prefix: _Prefix | None = None

    def begin(self) -> None:
        """Count from 0 again, and forget what was kept of the last target."""
        self.passes, self._prefix = Passes(), None

    def __len__(self) -> int:
        return len(self.labels)

    def find(self, word: str) -> list[int]:
        """The tokens of every place where the text has `word`, as a word of its own or a part of one."""
        document, out, at = self.document, set[int](), self.document.text.find(word)
        while at >= 0:
            inside = (document.starts < at + len(word)) & (document.stops > at)
            out |= {len(document.before) + int(place) for place in inside.nonzero()[0]}
            at = document.text.find(word, at + len(word))
        return sorted(out)

    def text(self, span: Span) -> str:
        """The text of a stretch, from the beginning of its first token to the end of its last, with what is between
        tokens."""
        first = len(self.document.before)
        places = slice(max(0, span[0] - first), max(0, span[1] - first))
        starts, stops = self.document.starts[places], self.document.stops[places]
        return self.document.text[starts.min() : stops.max()] if len(starts) else "".join(self.labels[slice(*span)])

    def leaves_no_key(self, target: int, span: Span) -> bool:
        """Whether a causal model's query before the target is hidden itself, with all that it sees in some layer.

        Queries after the span see themselves; a masked model's target stays in sight; a sink takes a softmax of its
        own.
        """
        if not self.causal or span[1] < target or self._sinks:
            return False
        return span[0] <= _first_in_sight(self.model.model, target - 1)

    def surprise(self, targets: Sequence[int], hidden: Sequence[Span | None] | None = None) -> NDArray[np.float64]:
        """-log p of each target in nats, with one span of keys hidden from every query in every layer; NaN where
        nothing is left to the query that predicts it (`leaves_no_key`).

        Masked models: the target is masked, and a span that holds it leaves its own place in sight.
        """
        spans: list[Span | None] = [None] * len(targets) if hidden is None else list(hidden)
        with torch.no_grad():
            if self.causal:
                return self._causal_surprise(targets, spans)
            out = [np.empty(0)]
            size = max(1, self.budget // len(self))
            for first in range(0, len(targets), size):
                part = slice(first, first + size)
                out.append(self._masked_surprise(targets[part], spans[part]))
            return np.concatenate(out)

    def estimate(self, targets: Sequence[int], spans: Sequence[Span]) -> Estimate:
        """The first-order effects of hiding each key, and each of the spans, on each target; one forward and one
        backward pass for each target. A causal model is run on the tokens before the target."""
        found = [self._estimate(target, spans) for target in targets]
        return Estimate(np.concatenate([part.keys for part in found]), np.concatenate([part.spans for part in found]))

    def in_pieces(self, targets: Sequence[int], pieces: Sequence[Span]) -> NDArray[np.float64]:
        """-log p of each target where the model is given one piece of the tokens alone, which holds the target.

        A causal model runs each piece once for all of its targets."""
        out = np.empty(len(targets))
        with torch.no_grad():
            for rows in self._batches(targets, pieces):
                starts = torch.tensor([pieces[row][0] for row in rows])
                ids = torch.stack([self.ids[slice(*pieces[row])] for row in rows])
                if not self.causal:
                    ids[torch.arange(len(rows)), torch.tensor([targets[row] for row in rows]) - starts] = self.mask
                self.passes.pieces += ids.numel()
                hidden = self._hidden(ids)
                for place, row in enumerate(rows):
                    same = [row] if not self.causal else [
                        other for other, piece in enumerate(pieces) if piece == pieces[row]
                    ]  # fmt: skip
                    chosen = [targets[other] for other in same]
                    at = torch.tensor(chosen) - pieces[row][0] - int(self.causal)
                    out[same] = self._read(hidden[place, at], chosen).cpu().double().numpy()
        return out

    def _batches(self, targets: Sequence[int], pieces: Sequence[Span]) -> Iterator[list[int]]:
        """Targets whose pieces are run together: pieces of one length, each once where the model is causal."""
        by_length = defaultdict(list)
        seen = set[Span]()
        for row, piece in enumerate(pieces):
            if not self.causal or piece not in seen:
                by_length[piece[1] - piece[0]].append(row)
            seen.add(piece)
        for length, rows in by_length.items():
            size = max(1, self.budget // length)
            yield from (rows[first : first + size] for first in range(0, len(rows), size))

    # ---- passes

    def _hidden(self, ids: Tensor, keep: Tensor | None = None, **inputs: Any) -> Tensor:
        """(B, N, d) of token numbers (B, N), with only the keys `keep` (B, N) in sight."""
        with Attachment(self.model.model, "exact", mlp_chunk=MLP_CHUNK) as attachment:
            attachment.keep = keep
            return self.head.hidden(ids, **inputs)

    def _read(self, hidden: Tensor, targets: Sequence[int]) -> Tensor:
        """(T,): -log p of the targets by rows (T, d)."""
        logits = self.head.head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        truth = self.ids[torch.tensor(list(targets), device=self.ids.device)]
        return logits.logsumexp(1) - logits.gather(1, truth.unsqueeze(1)).squeeze(1)

    def _masked_surprise(self, targets: Sequence[int], spans: Sequence[Span | None]) -> NDArray[np.float64]:
        rows, places = torch.arange(len(targets)), torch.tensor(list(targets))
        ids = self.ids.repeat(len(targets), 1)
        ids[rows, places] = self.mask
        keep = None
        if any(span is not None for span in spans):
            keep = torch.ones(ids.shape, dtype=torch.bool)
            for row, span in enumerate(spans):
                if span is not None:
                    keep[row, slice(*span)] = False
            keep[rows, places] = True
        self._count(len(targets), ids.numel())
        return self._read(self._hidden(ids, keep)[rows, places], targets).cpu().double().numpy()

    def _causal_surprise(self, targets: Sequence[int], spans: Sequence[Span | None]) -> NDArray[np.float64]:
        out = np.empty(len(targets))
        explained = {target for target, span in zip(targets, spans, strict=True) if span is not None}
        plain = [row for row, span in enumerate(spans) if span is None and targets[row] not in explained]
        if plain:
            # one pass predicts them all
            chosen = [targets[row] for row in plain]
            self._count(1, max(chosen))
            hidden = self._hidden(self.ids[None, : max(chosen)])[0]
            places = range(0, len(plain), MLP_CHUNK)
            read = [self._read(hidden[torch.tensor(chosen[at : at + MLP_CHUNK]) - 1], chosen[at : at + MLP_CHUNK])
                    for at in places]  # fmt: skip
            out[plain] = torch.cat(read).cpu().double().numpy()
        for row, (target, span) in enumerate(zip(targets, spans, strict=True)):
            if target in explained:
                prefix = self._prefix_of(target)
                out[row] = prefix.surprise if span is None else self._without(prefix, span)
        return out

    def _prefix_of(self, target: int) -> _Prefix:
        """The pass over the tokens before a target, kept for the spans that follow."""
        if self._prefix is None or self._prefix.target != target:
            self._prefix = None
            self._count(1, target)
            ids = self.ids[None, :target]
            cache = None
            if self.shares_prefix:
                hidden, cache = self._cached(ids, _new_cache(), 0)
            else:
                hidden = self._hidden(ids)
            self._prefix = _Prefix(target, cache, float(self._read(hidden[0, -1:], [target])))
        return self._prefix

    def _without(self, prefix: _Prefix, span: Span) -> float:
        """The surprise of the target with a span before it hidden."""
        target, (start, stop) = prefix.target, span
        if self.leaves_no_key(target, span):
            return float("nan")
        # the query that predicts the target is in the span itself: its own key has to be hidden from it
        if prefix.cache is None or stop == target:
            keep = torch.ones(1, target, dtype=torch.bool)
            keep[0, start:stop] = False
            self._count(1, target)
            hidden = self._hidden(self.ids[None, :target], keep)
        else:
            self._count(1, target - stop)
            hidden, _ = self._cached(self.ids[None, stop:target], _cut(prefix.cache, start), stop)
        return float(self._read(hidden[0, -1:], [target]))

    def _cached(self, ids: Tensor, cache: Any, first: int) -> tuple[Tensor, Any]:
        """Vectors (1, n, d) of tokens at positions `first`.., after the keys of `cache`; and the cache with theirs."""
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).unsqueeze(0)
        with Attachment(self.model.model, "exact", mlp_chunk=MLP_CHUNK):
            base: Any = self.head.base
            output = base(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        return output.last_hidden_state, output.past_key_values

    def _prefix_can_be_shared(self) -> bool:
        """Whether leaving keys out of a cache is hiding them: compared on a few tokens with hiding by a rule."""
        config: Any = self.model.model.config
        types = getattr(config, "layer_types", None) or ()
        if any("sliding" in kind or "chunked" in kind for kind in types) or getattr(config, "sliding_window", None):
            return False
        if "position_ids" not in inspect.signature(self.head.base.forward).parameters:
            return False
        count, (start, stop) = TRIED, TRIED_SPAN
        rows = len(self.head.head.weight)
        ids = torch.arange(count, device=self.ids.device).mul_(7).remainder_(rows).unsqueeze(0)
        keep = torch.ones(1, count, dtype=torch.bool)
        keep[0, start:stop] = False
        with torch.no_grad():
            expected = self._hidden(ids, keep)[0, -1].float()
            _, cache = self._cached(ids[:, :start], _new_cache(), 0)
            got = self._cached(ids[:, stop:], cache, stop)[0][0, -1].float()
        scale = expected.abs().amax().clamp(min=1e-6)
        # 2^8 roundings of the model's dtype: another order of sums, and far less than a wrong position makes
        return bool((got - expected).abs().amax() <= 2**8 * torch.finfo(self.head.head.weight.dtype).eps * scale)

    def _count(self, passes: int, tokens: int) -> None:
        self.passes.forward += passes
        self.passes.tokens += tokens

    # ---- the estimate

    def _estimate(self, target: int, spans: Sequence[Span]) -> Estimate:
        tokens = target if self.causal else len(self)
        ids = self.ids[None, :tokens].clone()
        reader = target - 1 if self.causal else target
        if not self.causal:
            ids[0, target] = self.mask
        sums = DeletionSums(1, tokens, spans, readers=[reader], kept=None if self.causal else [target])
        self._count(1, tokens)
        self.passes.backward += 1
        kept = _KeptCalls()
        with torch.enable_grad(), ObservedModel(self.model.model).observed(kept, "exact"):
            hidden = self.head.hidden(ids)
            surprise = self._read(hidden[0, reader : reader + 1], [target]).sum()
            outputs = [call.output for call in kept.calls if call.output is not None]
            gradients = torch.autograd.grad(surprise, outputs)
        for call, gradient in zip(kept.calls, gradients, strict=True):
            output = None if call.output is None else call.output.detach()
            sums.add(replace(call, output=output, output_gradient=gradient))
        keys = np.zeros((1, len(self)))
        keys[:, :tokens] = sums.keys.numpy()
        of_spans = sums.of_spans.numpy()
        of_spans[:, [self.leaves_no_key(target, span) for span in spans]] = np.nan
        return Estimate(keys, of_spans)


class _KeptCalls(Observer):
    """Keeps the attention calls of a forward pass with their outputs, which are part of its graph."""

    needs_gradient = True

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def begin(self) -> ForwardObserver:
        return _Keeping(self.calls)


class _Keeping(ForwardObserver):
    def __init__(self, calls: list[AttentionCall]) -> None:
        self.calls = calls

    def attended(self, call: AttentionCall) -> None:
        tensors = {name: getattr(call, name).detach() for name in ("query", "key", "value")}
        self.calls.append(replace(call, **tensors))


def _first_in_sight(model: Any, query: int) -> int:
    """The first key that a causal model's query sees in the layer where it sees the fewest."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"]
    first = [0]
    for kind in set(kinds):
        if "sliding" in kind and window is not None:
            first.append(query - window + 1)
        elif "chunked" in kind:
            first.append(query - query % config.attention_chunk_size)
    return max(first)


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _cut(cache: Any, tokens: int) -> Any:
    """A cache of the first tokens of another, which stays as it is."""
    out = _new_cache()
    for number, layer in enumerate(cache.layers):
        out.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], number)
    return out


def text_bytes(subject: TextContext, spans: int) -> int:
    """Predicted peak growth of memory, in bytes, with so many stretches.

    The larger of a batch of copies, with the keys and values of all layers that a causal model keeps, and of the
    estimate: the graph of a whole forward pass, the sweep over a tile, and the sums of a tile's queries by stretch.
    """
    model: Any = subject.model.model
    config = model.config.get_text_config()
    weight = subject.head.head.weight
    element, tokens, width = weight.element_size(), len(subject), weight.shape[1]
    wide = getattr(config, "intermediate_size", None) or 4 * width
    at_once = max(tokens, subject.budget)
    batch = (12 * at_once * width + 3 * min(at_once, MLP_CHUNK) * wide) * element
    layers, heads = subject.model.layers, subject.model.heads
    batch += 4 * layers * tokens * width * element if subject.shares_prefix else 0
    graph = layers * tokens * (16 * width + 6 * wide) * element
    shape = scan_shape(weight.device.type)
    tile = min(shape.scores, heads * shape.rows * tokens) * 40
    return max(batch, graph + tile + 4 * 8 * heads * shape.rows * spans)
