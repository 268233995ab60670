"""The claims of longlens' own methods, as the registry declares them."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from longlens.ops.attention import attention
from longlens.ops.masks import Rule
from longlens.ops.method import Method
from longlens.ops.registry import BY_NAME, MethodInfo, resolve_method
from longlens.ops.sparse.pattern import Pattern
from longlens.testing.claims import Claims, Request
from longlens.testing.conformance import MEMORY_LENGTHS, run_conformance
from longlens.testing.report import ConformanceReport

DTYPES = ("float32", "bfloat16", "float16", "float64")


def entry_of(method: Method) -> MethodInfo:
    """The registry's information on a method; a union of sparse methods claims what each of them supports."""
    return BY_NAME.get(method.name) or BY_NAME["window"]


def claims_of(method: Method | str) -> Claims:
    """The capabilities of `method` in the registry as claims, with its `reference` as the definition."""
    method = resolve_method(method)
    entry = entry_of(method)
    pattern = method if isinstance(method, Rule) else None
    exact = entry.exact == "all"
    return Claims(
        kind="exact" if exact else "pattern" if pattern is not None else "approximate",
        pattern=pattern,
        causal_pattern=method.causal_form() if isinstance(method, Pattern) else None,
        definition=None if exact else definition_of(method),
        causal="bottom-right" if entry.causal else None,
        key_mask="key_mask",
        attn_mask=entry.masks,
        packing="cu_seqlens",
        grouped=True,
        dtypes=DTYPES,
        second_derivatives=entry.second_derivatives,
        dropout=entry.dropout,
        lse="return_lse" if entry.lse else None,
        softcap=entry.softcap,
        sinks=entry.sinks,
        memory="N" if entry.memory == "N" else None,
        keywords={"method": str(method)},
    )


def definition_of(method: Method) -> Callable[[Request], Tensor]:
    """`method.reference` on a request, each packed sequence separately."""

    def define(request: Request) -> Tensor:
        inputs = request.inputs()
        parts = [inputs] if inputs.cu_seqlens is None else list(inputs.sequences())
        return torch.cat([method.reference(part) for part in parts], 2)

    return define


def run_method(
    method: Method | str,
    *,
    checks: Collection[str] | None = None,
    memory_lengths: tuple[int, int] = MEMORY_LENGTHS,
) -> ConformanceReport:
    """Run one of longlens' own methods, an object or its string form, through the suite."""
    method = resolve_method(method)
    return run_conformance(
        attention, claims=claims_of(method), checks=checks, memory_lengths=memory_lengths, name=str(method)
    )
