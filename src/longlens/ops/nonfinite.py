"""Keep non-finite keys and values from the queries that may not attend to them.

A masked weight is 0, but 0 x NaN is NaN, so a NaN behind a mask reaches the output of any plain implementation. Here
such keys and values are replaced by 0 and, afterwards, the queries that may attend to one are set to NaN.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longlens.ops.inputs import Inputs, all_finite
from longlens.ops.masks import Rule
from longlens.ops.method import Method
from longlens.ops.outputs import AttentionOutput

# queries, and keys, asked about at a time
PAIRS = 512


def attend_guarded(method: Method, inputs: Inputs) -> AttentionOutput:
    """`method.attend(inputs)`, with NaN and infinity behind masks kept from the output."""
    if inputs.key_mask is not None:
        inputs = _silence(inputs, inputs.key_mask[:, None, :, None])
    pattern = method if isinstance(method, Rule) else None
    if inputs.mask_rule() is None and pattern is None:
        return method.attend(inputs)
    if bool(all_finite(inputs.key) and all_finite(inputs.value)):
        return method.attend(inputs)
    finite = inputs.key.isfinite().all(3, keepdim=True) & inputs.value.isfinite().all(3, keepdim=True)
    out = method.attend(_silence(inputs, finite))
    touched = _touched(inputs, ~finite.squeeze(3), pattern)
    lse = None if out.lse is None else out.lse.masked_fill(touched, torch.nan)
    return AttentionOutput(out.output.masked_fill(touched.unsqueeze(-1), torch.nan), lse)


def _silence(inputs: Inputs, keep: Tensor) -> Inputs:
    """Zero the keys and values outside `keep` (B, 1 or Hkv, Nk, 1)."""
    zero = inputs.key.new_zeros(())
    return replace(inputs, key=torch.where(keep, inputs.key, zero), value=torch.where(keep, inputs.value, zero))


def _touched(inputs: Inputs, bad: Tensor, pattern: Rule | None) -> Tensor:
    """(B, H, Nq) bool: queries that may attend to a key marked in `bad` (B, Hkv, Nk)."""
    columns = bad.any(0).any(0).nonzero().squeeze(1)
    rules = [rule for rule in (inputs.mask_rule(), pattern) if rule is not None]
    touched = torch.zeros(inputs.query.shape[:3], dtype=torch.bool, device=bad.device)
    for some in columns.split(PAIRS):
        flags = bad[:, :, some].repeat_interleave(inputs.groups, 1).unsqueeze(2)
        if inputs.key_mask is not None:
            flags = flags & inputs.key_mask[:, None, None, some]
        for start in range(0, inputs.queries, PAIRS):
            stop = min(start + PAIRS, inputs.queries)
            q = torch.arange(start, stop, device=some.device).unsqueeze(1) + inputs.offset
            reach = flags.expand(-1, -1, stop - start, -1)
            for rule in rules:
                reach = reach & rule.allowed(q, some.unsqueeze(0), inputs.keys)
            touched[:, :, start:stop] |= reach.any(-1)
    return touched
