"""Capped scores and sinks equal their definition in float64, with every gradient, in every method that has weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import longlens as ll
from longlens.errors import InputError, UnsupportedError
from longlens.ops.exact import exact as exact_module
from longlens.ops.inputs import check_inputs
from longlens.ops.masks import Rule
from longlens.ops.reference import allowed_pairs
from longlens.ops.registry import METHOD_INFOS, parse_method
from longlens.ops.sparse import pattern as pattern_module
from longlens.ops.tiles import dense, grid

METHODS = ["exact", "exact:blockwise", "exact:math", "window:5", "bigbird:4,1", "dilated:3,2", "window:2|global:(0,)"]
N, CAP = 37, 1.5


@pytest.fixture(params=["usual tiles", "small tiles"])
def tiling(request, monkeypatch):
    """Tiles as they are, and so small that rows take several pieces and heads several groups."""
    if request.param == "small tiles":
        small = grid.TileShape(8, 6, 60)
        for module in (exact_module, dense):
            monkeypatch.setattr(module, "dense_shape", lambda inputs: small)
        monkeypatch.setattr(pattern_module, "sparse_shape", lambda inputs: small)


def literal(inputs, pattern):
    """Output and log-sum-exp of one sequence by definition: N x N, each step written out, the sink as a column."""
    key, value = (t.repeat_interleave(inputs.groups, 1) for t in (inputs.key, inputs.value))
    scores = inputs.query @ key.transpose(2, 3) * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    if inputs.bias is not None:
        i = torch.arange(inputs.queries).unsqueeze(1) + inputs.offset
        scores = scores + inputs.bias.tile(i, torch.arange(inputs.keys).unsqueeze(0), inputs.keys)
    keep = allowed_pairs(inputs, pattern)
    # a finite number, so that rows without keys have gradients
    scores = scores.masked_fill(~keep, -1e9)
    if inputs.sinks is not None:
        scores = torch.cat([scores, inputs.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    empty = ~keep.any(-1)
    output = (torch.softmax(scores, -1)[..., : inputs.keys] * keep) @ value
    return output, torch.logsumexp(scores, -1).masked_fill(empty, -torch.inf)


def definition(method, tensors, bias, sinks, **given):
    method = parse_method(method)
    inputs = check_inputs(
        *tensors, given.get("attn_mask"), 0.0, given.get("is_causal", False), None, given.get("key_mask"),
        given.get("cu_seqlens"), bias, True, given.get("softcap"), sinks,
    )  # fmt: skip
    parts = [inputs] if inputs.cu_seqlens is None else list(inputs.sequences())
    rows = []
    for part in parts:
        forms = [(form if isinstance(form, Rule) else None, one) for form, one in method.localise(part)]
        found = [literal(one, form) for form, one in forms]
        rows.append([torch.cat(tensors) for tensors in zip(*found, strict=True)])
    return [torch.cat(tensors, 2) for tensors in zip(*rows, strict=True)]


def key_mask():
    keep = torch.ones(2, N, dtype=torch.bool)
    keep[0, :7] = False
    keep[1, 30:] = False
    return keep


CASES = {
    "plain": dict,
    "causal and padded": lambda: {"is_causal": True, "key_mask": key_mask()},
    "a row without keys": lambda: {"key_mask": torch.tensor([[True], [False]]).expand(2, N)},
    "a mask rule": lambda: {"is_causal": True, "attn_mask": ll.Predicate(lambda b, h, q, k: (q + k + b) % 3 != 0)},
    "fewer queries": lambda: {"queries": 5, "is_causal": True},
    "fewer keys": lambda: {"keys": 9, "is_causal": True},
    "packed": lambda: {"batch": 1, "cu_seqlens": torch.tensor([0, 11, 12, N], dtype=torch.int32), "is_causal": True},
    "bias": lambda: {"bias": (1, 4, N, N)},
    "bias of each row, padded": lambda: {"bias": (2, 1, N, N), "key_mask": key_mask()},
    "table, packed": lambda: {"batch": 1, "table": 9, "cu_seqlens": torch.tensor([0, 20, N], dtype=torch.int32)},
}


def make(case, which, dtype=torch.float64):
    given = CASES[case]()
    batch = given.pop("batch", 2)
    shapes = [(4, given.pop("queries", N), 8), *[(2, given.pop("keys", N), width) for width in (8, 5)]]
    shapes[2] = (2, shapes[1][1], 5)
    tensors = [torch.randn(batch, *shape, dtype=dtype).mul_(2).requires_grad_() for shape in shapes]
    learned = None
    if "bias" in given:
        learned = torch.randn(given.pop("bias"), dtype=dtype).requires_grad_()
        given["bias"] = learned
    if "table" in given:
        learned = torch.randn(4, given.pop("table"), dtype=dtype).requires_grad_()
        given["bias"] = ll.RelativePosition(learned)
    sinks = torch.randn(4, dtype=dtype).requires_grad_() if "sinks" in which else None
    if "softcap" in which:
        given["softcap"] = CAP
    return tensors, learned, sinks, given


# both in every case, and each alone in the first
TOGETHER = [(case, "softcap and sinks") for case in CASES]
ALONE = [(next(iter(CASES)), which) for which in ("softcap", "sinks")]


@pytest.mark.parametrize(("case", "which"), TOGETHER + ALONE)
@pytest.mark.parametrize("method", METHODS)
def test_output_and_every_gradient(method, case, which, tiling):
    tensors, learned, sinks, given = make(case, which)
    found, found_lse = ll.attention(*tensors, method=method, sinks=sinks, return_lse=True, **given)
    expected, lse = definition(method, tensors, given.pop("bias", None), sinks, **given)
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(found_lse, lse, **close)
    leaves = [tensor for tensor in (*tensors, learned, sinks) if tensor is not None]
    weight, lse_weight = torch.randn_like(expected), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0.0)

    def gradients(output, log_sum):
        kept = log_sum.masked_fill(log_sum == -torch.inf, 0.0)
        return torch.autograd.grad((output * weight).sum() + (kept * lse_weight).sum(), leaves)

    for ours, theirs in zip(gradients(found, found_lse), gradients(expected, lse), strict=True):
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("method", ["exact", "window:5", "bigbird:4,1"])
def test_the_output_alone_is_the_same(method):
    """Without a log-sum-exp, other routes run: the cap's derivative then meets the plain softmax's."""
    tensors, _, sinks, given = make("causal and padded", "softcap and sinks")
    for one in (sinks, None):
        found = ll.attention(*tensors, method=method, sinks=one, **given)
        expected, _ = definition(method, tensors, None, one, **given)
        weight = torch.randn_like(expected)
        leaves = [*tensors, *(() if one is None else (one,))]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        ours, theirs = (torch.autograd.grad((out * weight).sum(), leaves) for out in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["lsh:2,8", "window:3|lsh:2,8"])
def test_hashed_pairs(method):
    tensors, _, sinks, given = make("causal and padded", "softcap and sinks")
    found = ll.attention(*tensors, method=method, sinks=sinks, **given)
    inputs = check_inputs(
        *tensors, None, 0.0, True, None, given["key_mask"], None, None, False, given["softcap"], sinks
    )  # fmt: skip
    expected = parse_method(method).reference(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    leaves = [*tensors, sinks]
    ours, theirs = (torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    tensors, _, sinks, given = make("causal and padded", "softcap and sinks", dtype)
    found = ll.attention(*tensors, sinks=sinks, **given)
    wide = [tensor.detach().double() for tensor in tensors]
    expected, _ = definition("exact", wide, None, sinks.detach().double(), **given)
    assert found.dtype == dtype
    scale = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=scale, atol=2 * scale)


@pytest.mark.parametrize("method", ["exact", "window:3", "window:2|global:(0,)"])
def test_dropout_keeps_the_mean_and_the_backward_pass_drops_the_same(method):
    given = {"method": method, "softcap": CAP, "sinks": torch.randn(4)}
    query, key, value = (torch.randn(1, 4, 9, 8, requires_grad=True) for _ in range(3))
    still = ll.attention(query, key, value, **given)
    with torch.no_grad():
        many = [tensor.expand(1500, -1, -1, -1) for tensor in (query, key, value)]
        runs = ll.attention(*many, dropout_p=0.4, **given)
    assert ((runs.mean(0, keepdim=True) - still).abs() < 5 * runs.std(0) / 1500**0.5 + 1e-6).all()
    # the output is linear in the values: their gradient times the values is the output, if both drop the same weights
    found = ll.attention(query, key, value, dropout_p=0.4, **given)
    (gradient,) = torch.autograd.grad(found.sum(), value)
    torch.testing.assert_close((gradient * value).sum(), found.sum(), rtol=1e-4, atol=1e-4)


def test_gradients_under_dropout_are_those_of_the_dropped_weights():
    """Central differences of the sinks and the query, with the mask of one seed."""
    tensors = [torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(*leaves):
        torch.manual_seed(5)
        return ll.attention(*leaves[:3], dropout_p=0.3, softcap=CAP, sinks=leaves[3], method="exact:blockwise")

    assert torch.autograd.gradcheck(run, (*tensors, sinks), fast_mode=True)


def test_no_keys_and_no_queries():
    query, none = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 0, 8)
    output, lse = ll.attention(query, none, none, sinks=torch.zeros(4), softcap=2.0, return_lse=True)
    assert (output == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("given", [{"softcap": 2.0}, {"sinks": torch.zeros(4)}], ids=["softcap", "sinks"])
@pytest.mark.parametrize("entry", [e for e in METHOD_INFOS if e.family == "approximate"], ids=lambda entry: entry.name)
def test_approximations_refuse_with_a_reason(entry, given):
    method = "cosformer:64" if entry.name == "cosformer" else entry.name
    query = torch.randn(1, 4, 8, 8)
    reason = "forms no scores to cap" if "softcap" in given else "no softmax that a sink could join"
    with pytest.raises(UnsupportedError, match=reason) as caught:
        ll.attention(query, query, query, method=method, **given)
    assert "window" in str(caught.value).splitlines()[-1]


@pytest.mark.parametrize("path", ["sdpa", "flex"])
def test_paths_that_cannot_are_refused_when_named(path):
    query = torch.randn(1, 4, 8, 16)
    for given in ({"softcap": 2.0}, {"sinks": torch.zeros(4)}):
        with pytest.raises(UnsupportedError, match=f"path '{path}': it (has|takes) no {next(iter(given))}"):
            ll.attention(query, query, query, method=f"exact:{path}", **given)


@pytest.mark.parametrize("softcap", [0, -1.0, float("inf"), float("nan"), True, "2", torch.tensor(2.0)])
def test_a_softcap_that_is_none(softcap):
    query = torch.randn(1, 4, 8, 8)
    with pytest.raises(InputError, match="positive, finite"):
        ll.attention(query, query, query, softcap=softcap)


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(1, 4), torch.zeros(4).long(), [0.0] * 4, 1.0])
def test_sinks_that_are_none(sinks):
    query = torch.randn(1, 4, 8, 8)
    with pytest.raises(InputError, match="expected sinks"):
        ll.attention(query, query, query, sinks=sinks)


def test_explain_knows_them():
    shape = (1, 4, 4096, 64)
    for given in ({"softcap": 30.0}, {"sinks": True}):
        explained = ll.explain(shape, **given)
        assert explained.path == "blockwise"
        name = next(iter(given))
        assert any(name in reason for reason in explained.why_not["sdpa"])
        assert name in explained.request
        assert explained.other_methods["performer"]
        assert not explained.other_methods["window"]
        assert ll.explain(shape, method="window:64", **given).path == "tiles"


def test_packed_sequences_share_the_sinks():
    tensors, _, sinks, given = make("packed", "softcap and sinks")
    packed = ll.attention(*tensors, sinks=sinks, **given)
    alone = [
        ll.attention(*(t[:, :, a:b] for t in tensors), sinks=sinks, softcap=CAP, is_causal=True)
        for a, b in pairwise(given["cu_seqlens"].tolist())
    ]
    torch.testing.assert_close(packed, torch.cat(alone, 2))


def test_inputs_describe_them():
    query = torch.randn(1, 4, 8, 8)
    inputs = check_inputs(query, query, query, None, 0.0, False, None, None, None, None, False, 2.0, torch.zeros(4))
    assert "softcap=2.0" in inputs.describe()
    assert "sinks" in inputs.describe()
    assert replace(inputs, sinks=torch.zeros(4, requires_grad=True)).needs_grad
