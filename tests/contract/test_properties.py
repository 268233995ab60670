"""Any shape, mask and method, against the definition in float64: hypothesis looks for the combination that breaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import longlens
from longlens.ops.inputs import check_inputs
from longlens.ops.masks import Rule
from longlens.ops.method import Method
from longlens.testing import claims_of
from longlens.testing.subject import relative_error
from methods import METHODS

# their log-sum-exp is over every kept key, so that parts add up
EXACT = [method for method in METHODS if method.name in ("exact", "window", "dilated")]
# as far as two orders of summation in float64 may lie apart, Nystrom's iterated inverse included
LIMIT = 1e-9
RULES: list[Rule | None] = [
    None,
    longlens.Causal(),
    longlens.Prefix(5),
    longlens.Window(7, 2),
    longlens.Window(9) & longlens.Causal(),
    longlens.Strided(4),
    longlens.Predicate(lambda b, h, q, k: (q + k) % 3 != 0),
]


@dataclass(frozen=True)
class Case:
    """One call: a method, tensors and keywords."""

    method: Method
    tensors: tuple[Tensor, Tensor, Tensor]
    keywords: dict[str, Any]

    def __repr__(self) -> str:
        shapes = [tuple(tensor.shape) for tensor in self.tensors]
        return f"Case({self.method}, {shapes}, {self.keywords})"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    method = draw(st.sampled_from(METHODS))
    claims = claims_of(method)
    packed = draw(st.booleans())
    batch = 1 if packed else draw(st.integers(1, 3))
    key_heads = draw(st.integers(1, 2))
    heads = key_heads * draw(st.integers(1, 3))
    width, value_width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    keys = draw(st.integers(1, 70))
    queries = keys if packed else draw(st.one_of(st.just(keys), st.integers(1, 70)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = (
        normal(batch, heads, queries, width),
        normal(batch, key_heads, keys, width),
        normal(batch, key_heads, keys, value_width),
    )
    keywords: dict[str, Any] = {"is_causal": claims.causal is not None and draw(st.booleans())}
    if draw(st.booleans()):
        keywords["scale"] = draw(st.sampled_from([0.1, 0.5, 1.0]))
    if draw(st.booleans()):
        keywords["key_mask"] = torch.rand(batch, keys, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    if packed:
        cuts = draw(st.lists(st.integers(0, keys), max_size=4))
        keywords["cu_seqlens"] = torch.tensor([0, *sorted(cuts), keys], dtype=torch.int32)
    if claims.attn_mask:
        keywords["attn_mask"] = draw(st.sampled_from(RULES))
    return Case(method, tensors, keywords)


def expected(case: Case) -> Tensor:
    """The method's own definition, sequence by sequence; empty sequences are left out."""
    given_words = case.keywords
    inputs = check_inputs(
        *case.tensors, given_words.get("attn_mask"), 0.0, given_words["is_causal"], given_words.get("scale"),
        given_words.get("key_mask"), given_words.get("cu_seqlens"), None, False,
    )  # fmt: skip
    parts = [inputs] if inputs.cu_seqlens is None else [part for part in inputs.sequences() if part.keys]
    return torch.cat([case.method.reference(part) for part in parts], 2)


quick = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@quick
@given(cases())
def test_output_is_the_definition(case: Case) -> None:
    found = longlens.attention(*case.tensors, method=case.method, **case.keywords)
    assert isinstance(found, Tensor)
    assert relative_error(found, expected(case)) < LIMIT


@quick
@given(cases())
def test_gradients_are_the_definitions(case: Case) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors]
    found = longlens.attention(*leaves, method=case.method, **case.keywords)
    again = [tensor.clone().requires_grad_() for tensor in case.tensors]
    wanted = expected(Case(case.method, (again[0], again[1], again[2]), case.keywords))
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = torch.autograd.grad(found, leaves, weight)
    theirs = torch.autograd.grad(wanted, again, weight, allow_unused=True)
    for gradient, other in zip(ours, theirs, strict=True):
        # 1 is the size of the weights: where everything is masked the gradients are 0 on both sides
        other = torch.zeros_like(gradient) if other is None else other
        assert (gradient - other).norm() <= LIMIT * (1 + other.norm())


@quick
@given(cases(), st.integers(0, 69))
def test_causal_means_causal(case: Case, cut: int) -> None:
    keys, queries = case.tensors[1].shape[2], case.tensors[0].shape[2]
    if claims_of(case.method).causal is None or keys != queries or "cu_seqlens" in case.keywords:
        return
    keywords = case.keywords | {"is_causal": True, "attn_mask": None}
    cut = cut % keys
    other = [torch.cat([tensor[:, :, :cut], -3 * tensor[:, :, cut:]], 2) for tensor in case.tensors]
    first, second = (
        longlens.attention(*given_ones, method=case.method, **keywords) for given_ones in (case.tensors, other)
    )
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    assert relative_error(second[:, :, :cut], first[:, :, :cut]) < LIMIT


@quick
@given(cases())
def test_heads_and_rows_are_independent(case: Case) -> None:
    """One head of one row gives what it gives among the others."""
    keywords = dict(case.keywords)
    if isinstance(keywords.get("attn_mask"), longlens.Predicate):
        keywords["attn_mask"] = None
    whole = longlens.attention(*case.tensors, method=case.method, **keywords)
    groups = case.tensors[0].shape[1] // case.tensors[1].shape[1]
    row, head = case.tensors[0].shape[0] - 1, case.tensors[0].shape[1] - 1
    one = [
        tensor[row : row + 1, place : place + 1]
        for tensor, place in zip(case.tensors, (head, head // groups, head // groups), strict=True)
    ]
    if "key_mask" in keywords:
        keywords["key_mask"] = keywords["key_mask"][row : row + 1]
    alone = longlens.attention(*one, method=case.method, **keywords)
    assert isinstance(whole, Tensor)
    assert isinstance(alone, Tensor)
    assert relative_error(alone, whole[row : row + 1, head : head + 1]) < LIMIT


@quick
@given(st.sampled_from(EXACT), st.integers(1, 40), st.booleans())
def test_log_sum_exp_merges(method: Method, cut: int, is_causal: bool) -> None:
    """Two halves of the keys, weighted by their log-sum-exp, are the whole."""
    generator = torch.Generator().manual_seed(cut)
    query, key, value = (torch.randn(2, 2, 41, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    keep = torch.arange(41).unsqueeze(0).expand(2, -1) < cut
    halves = [
        longlens.attention(query, key, value, is_causal=is_causal, key_mask=mask, return_lse=True, method=method)
        for mask in (keep, ~keep)
    ]
    outs, lses = zip(*halves, strict=True)
    weights = torch.softmax(torch.stack([lse.double() for lse in lses]), 0).unsqueeze(-1)
    merged = (torch.stack(outs) * weights).sum(0)
    whole = longlens.attention(query, key, value, is_causal=is_causal, method=method)
    assert isinstance(whole, Tensor)
    # the log-sum-exp is float32
    assert relative_error(merged, whole) < 1e-6
