"""Compiled FlexAttention (Dong et al. 2024, arXiv:2412.05496): mask rules and log-sum-exp on CUDA in fused kernels.

The rules are handed over as a `mask_mod`, with a block mask built by the compiler so that no N x N mask is made.
It is chosen only by name: compiled code is made again for each shape, up to the compiler's limit. Past it
FlexAttention would run uncompiled, in N x N memory, so it is compiled whole (`fullgraph=True`), which raises instead.
On a CPU it serves the forward pass only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longlens.errors import UnsupportedError
from longlens.ops.inputs import Inputs
from longlens.ops.masks import AllOf, Causal, Prefix, Rule
from longlens.ops.outputs import AttentionOutput

# rules that are plain arithmetic on positions, which the compiler can trace
TRACEABLE = (Causal, Prefix)


def refusals(inputs: Inputs) -> list[str]:
    """Why FlexAttention cannot serve these inputs."""
    rule = inputs.mask_rule()
    members: tuple[Rule, ...] = () if rule is None else rule.rules if isinstance(rule, AllOf) else (rule,)
    cuda = inputs.device_type == "cuda"
    width = inputs.query.shape[3]
    wants = {
        "it has no dropout": inputs.dropout > 0,
        "it takes no bias object here": inputs.bias is not None,
        "it takes no softcap here": inputs.softcap is not None,
        "it takes no sinks here": inputs.sinks is not None,
        "a rule is not plain arithmetic on positions": any(not _traceable(member) for member in members),
        "on a CPU it has no backward pass": not cuda and inputs.needs_grad,
        "on a CPU it gives no log-sum-exp": not cuda and inputs.need_lse,
        "it wants the width to be a power of two from 16 to 256": width not in (16, 32, 64, 128, 256),
        "it wants the value width to be the head width": inputs.value.shape[3] != width,
        "it has no float64": inputs.query.dtype == torch.float64,
    }
    return [reason for reason, refused in wants.items() if refused]


def _traceable(rule: Rule) -> bool:
    return isinstance(rule, TRACEABLE) or getattr(rule, "traceable", False)


def attend(inputs: Inputs) -> AttentionOutput:
    """softmax(scale q k^T) v under the rules and the key mask; log-sum-exp where asked for (CUDA)."""
    # the compiler takes a second to import, which only those who use it should wait for
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        return _attend(inputs)
    except FailOnRecompileLimitHit as error:
        limit = torch._dynamo.config.recompile_limit
        raise UnsupportedError(
            f"exact:flex compiles once for each shape, and has reached PyTorch's limit of {limit} compilations; beyond "
            "it FlexAttention would take N x N memory. Use method='exact', pad inputs to a few lengths, or raise "
            "torch._dynamo.config.recompile_limit"
        ) from error


def _attend(inputs: Inputs) -> AttentionOutput:
    attention, make_mask = _compiled()
    batch, nq = inputs.query.shape[0], inputs.queries
    rule, key_mask, offset, n = inputs.mask_rule(), inputs.key_mask, inputs.offset, inputs.keys
    block_mask = None
    if rule is not None or key_mask is not None:

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            keep = k >= 0
            if rule is not None:
                keep = keep & rule.allowed(q + offset, k, n)
            return keep if key_mask is None else keep & key_mask[b, k]

        per_batch = batch if key_mask is not None else None
        block_mask = make_mask(mask_mod, per_batch, None, nq, n, device=inputs.query.device)
    options: dict[str, Any] = {"block_mask": block_mask, "scale": inputs.scale, "enable_gqa": inputs.groups > 1}
    if inputs.need_lse:
        output, lse = attention(inputs.query, inputs.key, inputs.value, return_lse=True, **options)
        return AttentionOutput(output, lse)
    return AttentionOutput(attention(inputs.query, inputs.key, inputs.value, **options), None)


@lru_cache(1)
def _compiled() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return (
        torch.compile(flex_attention, dynamic=False, fullgraph=True),
        torch.compile(create_block_mask, fullgraph=True),
    )
