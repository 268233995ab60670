"""The arguments of transformers' attention function, as arguments of `longlens.attention` and of the lens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from longlens.errors import MaskError, UnsupportedError
from longlens.hf.masks import DeferredMask, MaskRules
from longlens.ops.attention import attention
from longlens.ops.exact.exact import Exact
from longlens.ops.masks import Rule
from longlens.ops.method import Method

# keywords that some models hand to their attention function and that longlens cannot express
UNSERVED = ("head_mask", "alibi", "block_table", "layer_head_mask")


@dataclass(frozen=True)
class AttentionArguments:
    """The checked arguments of one call. Layout (B, H, N, D); `documents` (B, N) numbers packed sequences."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    is_causal: bool = False
    attn_mask: Rule | Tensor | None = None
    key_mask: Tensor | None = None
    documents: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None
    # earlier keys were dropped, by a cache or because no window reaches them
    trimmed: bool = False

    def settings(self, method: Method) -> dict[str, Any]:
        """Keywords of `longlens.attention` beside query, key and value; without dropout_p those of `longlens.scan`."""
        # one query at the end sees every key: exact attention then needs no mask, and is faster. The pattern of other
        # methods follows from it (LSH takes another number of buckets)
        causal = self.is_causal and not (self.query.shape[2] == 1 and isinstance(method, Exact))
        settings: dict[str, Any] = {
            "attn_mask": self.attn_mask, "is_causal": causal, "scale": self.scale, "key_mask": self.key_mask,
            "cu_seqlens": self.cu_seqlens, "bias": self.bias, "method": method, "dropout_p": self.dropout,
        }  # fmt: skip
        capped = {"softcap": self.softcap, "sinks": self.sinks}
        return settings | {name: value for name, value in capped.items() if value is not None}

    def seeing(self, keep: Tensor) -> AttentionArguments:
        """The same call with only the keys `keep` (B, Nk) in sight, whose positions stay."""
        if keep.shape != (self.query.shape[0], self.key.shape[2]):
            raise MaskError(
                f"expected keys to hide of shape (batch, keys) {(self.query.shape[0], self.key.shape[2])}, got "
                f"{tuple(keep.shape)}; this model cuts or extends its keys, so they cannot be hidden by number"
            )
        keep = keep.to(self.query.device)
        return replace(self, key_mask=keep if self.key_mask is None else self.key_mask & keep)

    def attend(self, method: Method) -> Tensor:
        """(B, H, Nq, Dv) by `method`."""
        if self.trimmed and not isinstance(method, Exact) and not (isinstance(method, Rule) and method.shift_invariant):
            raise UnsupportedError(
                f"method '{method}' needs the beginning of the text, and this model's sliding window has dropped the "
                "first keys from its cache; use exact, window or dilated, or run without a cache (use_cache=False)"
            )
        output = attention(self.query, self.key, self.value, **self.settings(method))
        assert isinstance(output, Tensor)
        return output

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        """(S + 1,) int32 boundaries of packed sequences, along the concatenated batch rows."""
        if self.documents is None:
            return None
        batch, length = self.documents.shape
        first = torch.ones(batch, 1, dtype=torch.bool, device=self.documents.device)
        starts = torch.cat([first, self.documents.diff() != 0], 1).flatten().nonzero().flatten()
        return torch.cat([starts, starts.new_tensor([batch * length])]).to(torch.int32)


def read_arguments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DeferredMask | Tensor | None,
    dropout: float,
    scaling: float | None,
    keywords: dict[str, Any],
) -> AttentionArguments:
    """The arguments that transformers gives to an attention function. `keywords`: its further keywords.

    Raises `UnsupportedError`, which names the argument, for anything that is not supported.
    """
    where = type(module).__name__
    _refuse(where, keywords)
    bias = keywords.get("position_bias")
    if isinstance(attention_mask, DeferredMask):
        plan = attention_mask.plan
        if attention_mask.shape[3] != key.shape[2] or attention_mask.shape[2] != query.shape[2]:
            raise MaskError(
                f"{where}: expected the mask's queries and keys, {attention_mask.shape[2:]}, to be those of the "
                f"attention, got {(query.shape[2], key.shape[2])}; this model cuts or extends its keys after the mask "
                "was made"
            )
    else:
        plan = _without_deferred_mask(module, query, key, attention_mask, keywords)
    cut = plan.keys
    if (cut.start, cut.stop) != (0, key.shape[2]):
        key, value = key[:, :, cut], value[:, :, cut]
        bias = bias if bias is None else bias[..., cut]
    rule: Rule | Tensor | None = plan.rule
    if isinstance(attention_mask, Tensor):
        rule = attention_mask
        if bias is not None and attention_mask.is_floating_point():
            rule, bias = None, bias + attention_mask
    key_mask = None if plan.key_mask is None else plan.key_mask.to(query.device)
    trimmed = cut.start > 0 or (isinstance(attention_mask, DeferredMask) and attention_mask.kv_offset > 0)
    documents = _packing(where, plan, query, key, keywords)
    if documents is not None and bias is not None and len(query) > 1:
        raise UnsupportedError(f"{where}: packed sequences with an additive bias are supported at batch size 1 only")
    return AttentionArguments(
        query, key, value, scaling, is_causal=plan.causal, attn_mask=rule, key_mask=key_mask, documents=documents,
        bias=bias, dropout=float(dropout), softcap=keywords.get("softcap"), sinks=keywords.get("s_aux"),
        trimmed=trimmed,
    )  # fmt: skip


def _refuse(where: str, keywords: dict[str, Any]) -> None:
    if keywords.get("output_attentions"):
        raise no_weights(where)
    if keywords.get("cache") is not None:
        raise UnsupportedError(f"{where}: continuous batching keeps its keys in a paged cache, which is not supported")
    for name in UNSERVED:
        if keywords.get(name) is not None:
            raise UnsupportedError(f"{where}: its attention takes '{name}', which is not supported")


def no_weights(where: str) -> UnsupportedError:
    """The error for `output_attentions=True`."""
    return UnsupportedError(
        f"{where}: output_attentions=True asks for N x N weights, which longlens.hf.attach never computes; use "
        "longlens.watch(model, collect=[...]) for statistics, or Cells(queries=...) for exact rows of them"
    )


def _without_deferred_mask(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Any, keywords: dict[str, Any]
) -> MaskRules:
    """A call without a `DeferredMask`: it has a 4-D tensor of the user, or the model makes no mask at all."""
    whole = slice(0, key.shape[2])
    where = type(module).__name__
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4:
            got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise UnsupportedError(f"{where}: expected a mask of four axes (B, H, Nq, Nk), got {got}")
        return MaskRules(whole)
    causal = keywords.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal or query.shape[2] == 1:
        return MaskRules(whole)
    # as transformers does with its fused attention: queries are aligned with the first keys
    return MaskRules(slice(0, min(query.shape[2], key.shape[2])), causal=True)


def _packing(where: str, plan: MaskRules, query: Tensor, key: Tensor, keywords: dict[str, Any]) -> Tensor | None:
    """(B, N) numbers of packed sequences: from restarting positions, or from boundaries given to the model."""
    bounds, others = keywords.get("cu_seq_lens_q"), keywords.get("cu_seq_lens_k")
    if bounds is None or others is None:
        return plan.documents
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or not torch.equal(bounds, others):
        raise UnsupportedError(
            f"{where}: cu_seq_lens_q and cu_seq_lens_k must be equal, with batch size 1 and as many "
            f"queries as keys; got batch size {query.shape[0]}, {query.shape[2]} queries and {key.shape[2]} keys"
        )
    if plan.closure:
        raise UnsupportedError(f"{where}: cu_seq_lens cannot be combined with this model's own mask function")
    lengths = bounds.diff().long()
    if int(bounds[-1]) != query.shape[2]:
        raise MaskError(f"{where}: expected cu_seq_lens_q to end at {query.shape[2]}, got {int(bounds[-1])}")
    documents = torch.arange(len(lengths), device=query.device).repeat_interleave(lengths.to(query.device)).unsqueeze(0)
    if plan.documents is not None:
        ours, theirs = documents.diff() != 0, plan.documents.diff() != 0
        if not torch.equal(ours, theirs.to(ours.device)):
            raise MaskError(f"{where}: cu_seq_lens and the restarts of position_ids name different sequences")
    return documents
