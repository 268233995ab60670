"""Capped scores equal their definition in float64, whatever the blocks; gradients too."""

from __future__ import annotations

import pytest
import torch

import longlens
from longlens.errors import UnsupportedError
from longlens.hf import capped
from longlens.hf.arguments import AttentionArguments
from longlens.ops.masks import SameDocument

CAP = 1.5


def dense(call, pattern=None):
    """The definition, N x N, float64."""
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = (t.double().repeat_interleave(groups, 1) for t in (call.key, call.value))
    nq, nk = call.query.shape[2], key.shape[2]
    scores = CAP * torch.tanh(call.query.double() @ key.transpose(2, 3) * call.scale / CAP)
    if call.bias is not None:
        scores = scores + call.bias
    i, j = torch.arange(nq).unsqueeze(1) + nk - nq, torch.arange(nk).unsqueeze(0)
    keep = torch.ones(scores.shape, dtype=torch.bool)
    if call.is_causal:
        keep = keep & (j <= i)
    for rule in (call.attn_mask, pattern):
        if rule is not None:
            keep = keep & rule.bind(2, 4).allowed(i, j, nk)
    if call.key_mask is not None:
        keep = keep & call.key_mask[:, None, None, :]
    if call.documents is not None:
        keep = keep & SameDocument(call.documents).allowed(i, j, nk)
    scores = scores.masked_fill(~keep, -torch.inf)
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    top = scores.amax(-1, keepdim=True).masked_fill(~scores.isfinite().any(-1, keepdim=True), 0.0)
    e = torch.exp(scores - top)
    return e[..., :nk] / e.sum(-1, keepdim=True).clamp(min=1e-300) @ value


def make(nq=37, nk=37, **more):
    query, key, value = torch.randn(2, 4, nq, 8), torch.randn(2, 2, nk, 8), torch.randn(2, 2, nk, 5)
    tensors = [tensor.requires_grad_() for tensor in (query, key, value)]
    return AttentionArguments(*tensors, scale=0.5, softcap=CAP, **more)


def key_mask(nk=37):
    mask = torch.ones(2, nk, dtype=torch.bool)
    mask[0, :7] = False
    return mask


CASES = {
    "all": lambda: make(),
    "causal, left padding": lambda: make(is_causal=True, key_mask=key_mask()),
    "cache": lambda: make(nq=5, is_causal=True),
    "window": lambda: make(is_causal=True, attn_mask=longlens.Window(6, 0)),
    "sinks": lambda: make(sinks=torch.randn(4).requires_grad_(), is_causal=True),
    "bias": lambda: make(bias=torch.randn(1, 4, 37, 37).requires_grad_()),
    "bias of each row": lambda: make(bias=torch.randn(2, 1, 37, 37).requires_grad_()),
    "own rule": lambda: make(attn_mask=longlens.Predicate(lambda b, h, q, k: (q + k + b) % 3 != 0)),
    "packed": lambda: make(is_causal=True, documents=torch.arange(37).div(13, rounding_mode="floor").expand(2, -1)),
}


@pytest.mark.parametrize("scores", [2**21, 1500, 1])
@pytest.mark.parametrize("name", CASES)
def test_the_definition(name, scores, monkeypatch):
    monkeypatch.setattr(capped, "ROWS", 16)
    monkeypatch.setattr(capped, "SCORES", scores)
    call = CASES[name]()
    found, expected = call.attend(longlens.Exact()), dense(call)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    leaves = [t for t in (call.query, call.key, call.value, call.bias, call.sinks) if t is not None]
    weight = torch.randn(expected.shape)
    ours = torch.autograd.grad((found * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_sparse_method_and_one_without_scores():
    call = make(key_mask=key_mask())
    method = longlens.Window(3)
    torch.testing.assert_close(call.attend(method).double(), dense(call, method), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match="no scores to cap"):
        call.attend(longlens.Performer(features=8))


def test_dropout_keeps_the_mean_and_the_backward_pass_drops_the_same():
    call = make(nq=6, nk=6)
    still = call.attend(longlens.Exact())
    dropped = AttentionArguments(call.query, call.key, call.value, scale=0.5, softcap=CAP, dropout=0.4)
    with torch.no_grad():
        runs = torch.stack([dropped.attend(longlens.Exact()) for _ in range(1500)])
    assert ((runs.mean(0) - still).abs() < 5 * runs.std(0) / 1500**0.5 + 1e-6).all()
    # the output is linear in the values: their gradient times the values is the output, if both drop the same weights
    found = dropped.attend(longlens.Exact())
    (gradient,) = torch.autograd.grad(found.sum(), call.value)
    torch.testing.assert_close((gradient * call.value).sum(), found.sum(), rtol=1e-4, atol=1e-4)


def test_float64_stays_float64():
    call = make()
    wide = AttentionArguments(call.query.double(), call.key.double(), call.value.double(), scale=0.5, softcap=CAP)
    torch.testing.assert_close(wide.attend(longlens.Exact()), dense(wide), rtol=1e-12, atol=1e-12)
