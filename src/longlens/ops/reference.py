"""Softmax attention by its definition: float64, quadratic, short. What everything exact is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from longlens.ops.inputs import Inputs
from longlens.ops.masks import Rule


def allowed_pairs(inputs: Inputs, pattern: Rule | None = None) -> Tensor:
    """(B, H, Nq, Nk) bool: the pairs that the masks, and `pattern` where given, let attend."""
    batch, heads, nq, _ = inputs.query.shape
    nk, device = inputs.keys, inputs.key.device
    q = (torch.arange(nq, device=device) + inputs.offset).unsqueeze(1)
    k = torch.arange(nk, device=device).unsqueeze(0)
    keep = torch.ones(batch, heads, nq, nk, dtype=torch.bool, device=device)
    for rule in (inputs.mask_rule(), pattern):
        if rule is not None:
            keep = keep & rule.allowed(q, k, nk)
    if inputs.key_mask is not None:
        keep = keep & inputs.key_mask[:, None, None, :]
    return keep


def softmax_attention(inputs: Inputs, pattern: Rule | None = None) -> tuple[Tensor, Tensor]:
    """Output (B, H, Nq, Dv) and log-sum-exp (B, H, Nq), both float64; no dropout. N x N memory.

    softmax(cap(scale q k^T) + bias) v over the allowed pairs, cap(s) = softcap tanh(s / softcap), with the sink as a
    further key without value; 0 and -inf for a query with no key, sink or not.
    """
    query, key, value = (t.double() for t in (inputs.query, inputs.key, inputs.value))
    key, value = (t.repeat_interleave(inputs.groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    if inputs.bias is not None:
        q = (torch.arange(inputs.queries, device=key.device) + inputs.offset).unsqueeze(1)
        k = torch.arange(inputs.keys, device=key.device).unsqueeze(0)
        scores = scores + inputs.bias.tile(q, k, inputs.keys).double()
    keep = allowed_pairs(inputs, pattern)
    scores = scores.masked_fill(~keep, -torch.inf)
    # a row with nothing to attend to, by masks or by a bias of -inf: its gradients are 0, where those of -inf are NaN
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(dead, 0.0), -1).masked_fill(dead.squeeze(-1), -torch.inf)
    if inputs.sinks is not None:
        with_sink = torch.logaddexp(lse, inputs.sinks.double().unsqueeze(-1))
        lse = torch.where(lse == -torch.inf, lse, with_sink)
    weights = torch.exp(scores.masked_fill(dead, 0.0) - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    weights = weights.masked_fill(dead, 0.0)
    # a weight of 0 must also silence a non-finite value
    poisoned = ~torch.isfinite(value).all(-1)
    touched = (keep & poisoned[:, :, None, :]).any(-1, keepdim=True)
    output = weights @ value.masked_fill(poisoned.unsqueeze(-1), 0.0)
    return output.masked_fill(touched, torch.nan), lse
