"""One call of transformers' attention function, as arguments of `longlens.attention` and of the lens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longlens.errors import MaskError, UnsupportedError
from longlens.hf.masks import Carrier, Plan
from longlens.ops.attention import attention
from longlens.ops.masks import Rule, SameDocument
from longlens.ops.method import Method

# what some models hand to their attention function and no rule of ours can express
UNSERVED = ("head_mask", "alibi", "block_table", "layer_head_mask")


@dataclass(frozen=True)
class Call:
    """Checked arguments of one call. Layout (B, H, N, D); `documents` (B, N) numbers packed sequences."""

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

    def attend(self, method: Method) -> Tensor:
        """(B, H, Nq, Dv) by `method`."""
        if self.documents is not None and self.query.shape[0] > 1:
            return self._folded().attend(method).unflatten(2, (len(self.query), -1)).squeeze(0).transpose(0, 1)
        output = attention(
            self.query, self.key, self.value, self.attn_mask, self.dropout, self.is_causal, self.scale, method=method,
            key_mask=self.key_mask, cu_seqlens=self.cu_seqlens(), bias=self.bias, softcap=self.softcap,
            sinks=self.sinks,
        )  # fmt: skip
        assert isinstance(output, Tensor)
        return output

    def for_scan(self) -> dict[str, Any]:
        """Keyword arguments of `longlens.lens.scan.scan`, beside query, key, value and method."""
        rule, packed = self.attn_mask, self.cu_seqlens()
        if self.documents is not None and packed is None:
            same = SameDocument(self.documents)
            rule = same if rule is None else same & rule  # type: ignore[operator]
        return {
            "attn_mask": rule, "is_causal": self.is_causal, "scale": self.scale, "key_mask": self.key_mask,
            "cu_seqlens": packed, "bias": self.bias, "softcap": self.softcap, "sinks": self.sinks,
        }  # fmt: skip

    def cu_seqlens(self) -> Tensor | None:
        """(S + 1,) int32 boundaries of packed sequences, with batch size 1."""
        if self.documents is None or len(self.documents) > 1:
            return None
        ids = self.documents[0]
        inner = (ids[1:] != ids[:-1]).nonzero().flatten() + 1
        ends = inner.new_tensor([0]), inner, inner.new_tensor([len(ids)])
        return torch.cat(ends).to(torch.int32)

    def of_heads(self, heads: Sequence[int]) -> Call:
        """The call for some query heads alone, each with a key head of its own."""
        groups = self.query.shape[1] // self.key.shape[1]
        chosen = list(heads)
        shared = [head // groups for head in chosen]

        def cut(tensor: Any) -> Any:
            by_head = isinstance(tensor, Tensor) and tensor.ndim == 4 and tensor.shape[1] > 1
            return tensor[:, chosen] if by_head else tensor

        return replace(
            self, query=self.query[:, chosen], key=self.key[:, shared], value=self.value[:, shared],
            attn_mask=cut(self.attn_mask), bias=cut(self.bias),
            sinks=None if self.sinks is None else self.sinks[chosen],
        )  # fmt: skip

    def _folded(self) -> Call:
        """All batch rows end to end in one."""
        assert self.documents is not None
        batch, _, length, _ = self.query.shape

        def fold(tensor: Tensor) -> Tensor:
            return tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0)

        # numbers that differ from row to row
        first = torch.arange(batch, device=self.documents.device).unsqueeze(1) * (length + 1)
        return replace(
            self, query=fold(self.query), key=fold(self.key), value=fold(self.value),
            documents=(self.documents + first).flatten().unsqueeze(0),
        )  # fmt: skip


def read_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Carrier | Tensor | None,
    dropout: float,
    scaling: float | None,
    given: dict[str, Any],
) -> Call:
    """What transformers hands to an attention function, as a `Call`. `given`: its further keywords.

    Raises `UnsupportedError` for what cannot be served, by name.
    """
    where = type(module).__name__
    _refuse(where, given)
    bias = given.get("position_bias")
    if isinstance(attention_mask, Carrier):
        plan = attention_mask.plan
        if attention_mask.shape[3] != key.shape[2] or attention_mask.shape[2] != query.shape[2]:
            raise MaskError(
                f"{where}: expected the mask's queries and keys, {attention_mask.shape[2:]}, to be those of the "
                f"attention, got {(query.shape[2], key.shape[2])}; this model cuts or extends its keys after the mask "
                "was made"
            )
    else:
        plan = _without_carrier(module, query, key, attention_mask, given)
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
    documents = _packing(where, plan, query, key, given)
    if documents is not None and bias is not None and len(query) > 1:
        raise UnsupportedError(f"{where}: packed sequences with an additive bias are served at batch size 1 alone")
    return Call(
        query, key, value, scaling, is_causal=plan.causal, attn_mask=rule, key_mask=key_mask, documents=documents,
        bias=bias, dropout=float(dropout), softcap=given.get("softcap"), sinks=given.get("s_aux"),
    )  # fmt: skip


def _refuse(where: str, given: dict[str, Any]) -> None:
    if given.get("output_attentions"):
        raise no_weights(where)
    if given.get("cache") is not None:
        raise UnsupportedError(f"{where}: continuous batching keeps its keys in a paged cache, which is not served")
    for name in UNSERVED:
        if given.get(name) is not None:
            raise UnsupportedError(f"{where}: its attention takes '{name}', which is not served")


def no_weights(where: str) -> UnsupportedError:
    """The refusal of `output_attentions=True`."""
    return UnsupportedError(
        f"{where}: output_attentions=True asks for the N x N weights, which never exist under longlens.hf.attach; use "
        "longlens.watch(model, collect=[...]) for statistics, or Cells(queries=...) for exact rows of them"
    )


def _without_carrier(module: nn.Module, query: Tensor, key: Tensor, attention_mask: Any, given: dict[str, Any]) -> Plan:
    """A call without a mask of ours: a user's 4-D tensor, or a model that makes no mask at all."""
    whole = slice(0, key.shape[2])
    where = type(module).__name__
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4:
            got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise UnsupportedError(f"{where}: expected a mask of four axes (B, H, Nq, Nk), got {got}")
        return Plan(whole)
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal or query.shape[2] == 1:
        return Plan(whole)
    # as transformers does with its fused attention: queries stand at the first keys
    return Plan(slice(0, min(query.shape[2], key.shape[2])), causal=True)


def _packing(where: str, plan: Plan, query: Tensor, key: Tensor, given: dict[str, Any]) -> Tensor | None:
    """(B, N) numbers of packed sequences: from restarting positions, or from boundaries given to the model."""
    bounds, others = given.get("cu_seq_lens_q"), given.get("cu_seq_lens_k")
    if bounds is None or others is None:
        return plan.documents
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or not torch.equal(bounds, others):
        raise UnsupportedError(
            f"{where}: cu_seq_lens_q and cu_seq_lens_k are served where they are equal, with batch size 1 and as many "
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
