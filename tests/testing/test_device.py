"""The suite on another device: the function and the plain implementation that sets its tolerance run there."""

from __future__ import annotations

from dataclasses import replace

import torch

import longlens
from longlens.testing import claims_of, run_conformance, subject
from longlens.testing.claims import Request


def test_the_function_and_the_plain_implementation_get_their_tensors_there(monkeypatch):
    """A device that rounds every tensor to 12 bits on its way: float64 references do not go there, the rest does."""
    asked: list[str] = []
    plain: list[torch.Tensor] = []

    def to(request, device):
        asked.append(device)
        return request.on(*(coarse(tensor) for tensor in request.tensors))

    def coarse(tensor):
        return tensor + (torch.round(tensor.detach() * 4096) / 4096 - tensor.detach())

    softmax = subject.plain_softmax

    def watched(request, claims):
        plain.append(request.query)
        return softmax(request, claims)

    monkeypatch.setattr(Request, "to", to)
    monkeypatch.setattr(subject, "plain_softmax", watched)
    checks = ["agreement", "gradients"]
    claims = replace(claims_of("exact"), dtypes=("float32",))
    report = run_conformance(longlens.attention, claims=claims, checks=checks, device="elsewhere")
    # rounding that the device does to both explains the function's error
    assert report.ok, str(report)
    assert set(asked) == {"elsewhere"}
    assert plain
    assert all(torch.equal(query, coarse(query)) for query in plain)


def test_a_function_that_is_wrong_there_is_caught(monkeypatch):
    def to(request, device):
        return request.on(request.query * 1.001, request.key, request.value)

    monkeypatch.setattr(Request, "to", to)
    softmax = subject.plain_softmax

    def right(request, claims):
        # the plain implementation is right on that device
        return softmax(request.on(request.query / 1.001, request.key, request.value), claims)

    monkeypatch.setattr(subject, "plain_softmax", right)
    report = run_conformance(longlens.attention, claims=claims_of("exact"), checks=["agreement"], device="elsewhere")
    assert not report.ok
