"""The claims of a function under test, and the arguments of one call of it.

A check runs only if the function claims the property that it checks; properties that are not claimed are reported as
not claimed, never as passed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from longlens.errors import InputError
from longlens.ops.inputs import Inputs, check_inputs
from longlens.ops.masks import Rule, TensorMask
from longlens.ops.reference import softmax_attention


@dataclass(frozen=True)
class Request:
    """The arguments of one call: tensors (B, H, N, D) and the others, by the conventions of `longlens.shapes`."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool = False
    scale: float | None = None
    attn_mask: Tensor | None = None
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dropout_p: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    def on(self, query: Tensor, key: Tensor, value: Tensor) -> Request:
        """The same request with other tensors."""
        return replace(self, query=query, key=key, value=value)

    def cut(self, batch: slice, tokens: slice | None = None) -> Request:
        """The same request restricted to some batch rows and some of their tokens; the masks are cut accordingly."""
        whole = slice(None) if tokens is None else tokens
        query, key, value = (tensor[batch, :, whole] for tensor in self.tensors)
        key_mask = None if self.key_mask is None or tokens is not None else self.key_mask[batch]
        attn_mask = None if self.attn_mask is None or tokens is not None else self.attn_mask[batch]
        return Request(query, key, value, self.is_causal, self.scale, attn_mask, key_mask)

    def cast(self, dtype: torch.dtype) -> Request:
        """The same request with its tensors in `dtype`."""
        sinks = None if self.sinks is None else self.sinks.to(dtype)
        return replace(self.on(*(tensor.to(dtype) for tensor in self.tensors)), sinks=sinks)

    def to(self, device: str) -> Request:
        """The same request with its tensors on a device."""
        moved: dict[str, Any] = {
            item.name: value.to(device)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)

    def inputs(self) -> Inputs:
        """The request as the library's own checked inputs."""
        return check_inputs(
            *self.tensors, self.attn_mask, self.dropout_p, self.is_causal, self.scale, self.key_mask, self.cu_seqlens,
            None, False, self.softcap, self.sinks,
        )  # fmt: skip


@dataclass(frozen=True)
class Claims:
    """The properties that an attention function claims; `run_conformance` tests these and nothing else.

    kind: "exact" is softmax attention over every pair that the masks allow; "pattern" over those that `pattern` allows
        too; "approximate" is anything else, compared with `definition` if there is one; its error is reported.
    pattern: the pairs of a sparse method, as a rule: `allowed(q, k, n)` of positions, True = attend.
    causal_pattern: the rule under `is_causal=True`, if it differs; the causal mask is added to it.
    definition: the function's own plain definition: takes a `Request`, returns (B, H, Nq, Dv).
    causal: how `is_causal=True` aligns where Nq != Nk: "bottom-right" (the last query sees every key) or "top-left";
        None: there is no causal form.
    bidirectional: `is_causal=False` works.
    key_mask: the keyword of the key mask, or None.
    key_mask_keep: True in the key mask means keep.
    key_mask_shape: "BN" is (B, Nk), "B11N" is (B, 1, 1, Nk).
    padding_invariant: sides on which padding, masked by the key mask, leaves the other rows as they were.
    attn_mask: a bool `attn_mask` is taken, True = attend.
    masks_with_causal: key masks and `attn_mask` go together with `is_causal=True`.
    packing: the keyword of the sequences' boundaries, or None.
    scale: `scale=` is taken.
    grouped: key/value heads may divide the query heads.
    value_width: the value width may differ from D.
    cross_lengths: Nq may differ from Nk.
    dtypes: names of dtypes.
    lengths: lengths to test beside the usual ones.
    gradients, second_derivatives, dropout: the function has them.
    lse: the keyword that adds the log-sum-exp, or None.
    softcap: `softcap=` is taken: scores become softcap tanh(s / softcap) before the masks.
    sinks: `sinks=` is taken: (H,) logits of a further key without value; the log-sum-exp includes it.
    memory: "N" where peak memory is linear in the length, else None.
    keywords: passed in every call.
    """

    kind: Literal["exact", "pattern", "approximate"] = "exact"
    pattern: Rule | None = None
    causal_pattern: Rule | None = None
    definition: Callable[[Request], Tensor] | None = None
    causal: Literal["bottom-right", "top-left"] | None = "bottom-right"
    bidirectional: bool = True
    key_mask: str | None = None
    key_mask_keep: bool = True
    key_mask_shape: Literal["BN", "B11N"] = "BN"
    padding_invariant: tuple[str, ...] = ("left", "right")
    attn_mask: bool = False
    masks_with_causal: bool = True
    packing: str | None = None
    scale: bool = True
    grouped: bool = False
    value_width: bool = True
    cross_lengths: bool = True
    dtypes: tuple[str, ...] = ("float32",)
    lengths: tuple[int, ...] = (1, 63, 1000)
    gradients: bool = True
    second_derivatives: bool = False
    dropout: bool = False
    lse: str | None = None
    softcap: bool = False
    sinks: bool = False
    memory: Literal["N"] | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "pattern", "approximate"):
            raise InputError(f"expected kind 'exact', 'pattern' or 'approximate', got {self.kind!r}")
        if (self.kind == "pattern") != (self.pattern is not None):
            raise InputError("expected `pattern` with kind 'pattern', and with no other")
        if self.causal not in (None, "bottom-right", "top-left"):
            raise InputError(f"expected causal 'bottom-right', 'top-left' or None, got {self.causal!r}")
        if self.causal is None and not self.bidirectional:
            raise InputError("expected a function that is causal, bidirectional or both")
        unknown = set(self.dtypes) - {"float32", "bfloat16", "float16", "float64"}
        if unknown or not self.dtypes:
            raise InputError(f"expected dtypes among float32, bfloat16, float16, float64, got {self.dtypes}")
        if self.key_mask_shape not in ("BN", "B11N"):
            raise InputError(f"expected key_mask_shape 'BN' or 'B11N', got {self.key_mask_shape!r}")
        if self.memory not in (None, "N"):
            raise InputError(f"expected memory 'N' or None, got {self.memory!r}")

    @property
    def sharpest(self) -> torch.dtype:
        """The most precise dtype claimed; correctness is checked in it."""
        order = ("float64", "float32", "float16", "bfloat16")
        return getattr(torch, next(name for name in order if name in self.dtypes))

    @property
    def defined(self) -> bool:
        """Whether there is a definition to compare with."""
        return self.kind != "approximate" or self.definition is not None

    def pattern_of(self, is_causal: bool) -> Rule | None:
        """The rule of a call."""
        return self.causal_pattern if is_causal and self.causal_pattern is not None else self.pattern

    @classmethod
    def names(cls) -> list[str]:
        """The names of the claims."""
        return [entry.name for entry in fields(cls)]


def softmax_definition(request: Request, pattern: Rule | None = None, align: str = "bottom-right") -> Tensor:
    """Softmax attention by definition, float64, sequence by sequence where packed."""
    return _softmax(request, pattern, align)[0]


def softmax_lse(request: Request, pattern: Rule | None = None, align: str = "bottom-right") -> Tensor:
    """The log-sum-exp that goes with `softmax_definition`, float64 (B, H, Nq)."""
    return _softmax(request, pattern, align)[1]


def _softmax(request: Request, pattern: Rule | None, align: str) -> tuple[Tensor, Tensor]:
    nq, nk = request.query.shape[2], request.key.shape[2]
    if request.is_causal and align == "top-left" and nq != nk:
        corner = torch.ones(1, 1, nq, nk, dtype=torch.bool, device=request.query.device).tril()
        rule: Rule = TensorMask(corner)
        pattern = rule if pattern is None else pattern & rule
        request = replace(request, is_causal=False)
    inputs = request.inputs()
    parts = [inputs] if inputs.cu_seqlens is None else list(inputs.sequences())
    outputs = [softmax_attention(part, pattern) for part in parts]
    return torch.cat([output for output, _ in outputs], 2), torch.cat([lse for _, lse in outputs], 2)
