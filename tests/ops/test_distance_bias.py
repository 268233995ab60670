"""Biases of distances in the fused CPU kernel: numbers, every gradient, linear memory, and who takes which path."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from compare import check, make

import longlens as ll
from longlens.errors import MaskError, UnsupportedError
from longlens.ops import fused_cpu
from longlens.ops.biases import Bias, diagonal_sums
from longlens.ops.exact import diagonals, distance_gradient
from longlens.ops.inputs import check_inputs
from longlens.ops.reference import softmax_attention
from longlens.testing import peak_growths
from longlens.testing.memory import LINEAR

PATH = "exact:toeplitz"


@pytest.fixture(params=["usual blocks", "small blocks"])
def blocks(request, monkeypatch):
    """Blocks as they are, and so small that a call has many, also beside the band."""
    if request.param == "small blocks":
        monkeypatch.setattr(diagonals, "CAUSAL_ROWS", 16)
        monkeypatch.setattr(distance_gradient, "ROWS", 8)
        monkeypatch.setattr(distance_gradient, "SCORES", 8 * 4 * 11)


def relative(kind: str, buckets: int, max_distance: int = 40) -> ll.RelativePosition:
    table = torch.randn(4, buckets, dtype=torch.float64, requires_grad=True)
    return ll.RelativePosition(table, kind, max_distance)


BIASES = {
    "ALiBi": lambda: ll.Alibi(4),
    "clip": lambda: relative("clip", 15),
    "clip of one bucket": lambda: relative("clip", 1),
    "clip beyond the length": lambda: relative("clip", 301),
    "T5": lambda: relative("t5", 32),
    "T5 beyond the length": lambda: relative("t5", 32, 128),
    "T5, the past": lambda: relative("t5-causal", 8, 20),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(70, 70, False), (70, 70, True), (50, 71, False), (71, 50, False), (40, 71, True), (71, 40, True), (1, 60, False),
     (60, 1, False), (1, 1, True)],
)  # fmt: skip
def test_output_and_gradients_are_the_definitions(name, queries, keys, causal, blocks):
    query, key, value = make(2, 4, 2, queries, keys, 8)
    bias = BIASES[name]()
    assert ll.explain(query, key, value, bias=bias, is_causal=causal).path == "toeplitz"
    # the log-sum-exp has no gradient on this path, so `check` takes the tiles for that half
    check("exact", query, key, value, bias=bias, is_causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["clip", "T5"])
def test_a_scale_of_zero_leaves_the_bias_alone(name, causal, blocks):
    query, key, value = make(2, 4, 2, 70, 70, 8)
    bias = BIASES[name]()
    assert ll.explain(query, key, value, bias=bias, is_causal=causal, scale=0.0).path == "toeplitz"
    check("exact", query, key, value, bias=bias, is_causal=causal, scale=0.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0, -0.7])
@pytest.mark.parametrize("value_width", [5, 8, 9, 13])
def test_key_masks_with_holes(causal, scale, value_width, blocks):
    mask = torch.rand(3, 70) > 0.4
    mask[0, :20] = False
    mask[1] = False
    bias = relative("t5", 32)
    arguments = {"bias": bias, "key_mask": mask, "is_causal": causal, "scale": scale}
    query, key, value = make(3, 4, 1, 70, 70, 8, value_width)
    assert ll.explain(query, key, value, **arguments).path == "toeplitz"
    output = check("exact", query, key, value, **arguments)
    assert not output[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_log_sum_exp(dtype, masked, causal):
    query, key, value = (tensor.detach().to(dtype) for tensor in make(2, 4, 2, 60, 60, 16))
    mask = torch.arange(60) % 5 > torch.tensor([[0], [9]]) if masked else None
    bias = ll.RelativePosition(torch.randn(4, 32), "t5")
    output, lse = ll.attention(
        query, key, value, bias=bias, key_mask=mask, is_causal=causal, return_lse=True, method=PATH
    )
    inputs = check_inputs(query, key, value, None, 0.0, causal, None, mask, None, bias, True)
    want, want_lse = softmax_attention(inputs)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(output.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_lower_precision_err_no_more_than_twice_a_plain_implementation(dtype):
    query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in make(1, 4, 2, 300, 300, 16))
    table = torch.randn(4, 32, requires_grad=True)
    weights = torch.randn(1, 4, 300, 16, dtype=torch.float64)
    wanted = [query, key, value, table]

    def plain(kind):
        q, k, v = (tensor.to(kind) for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(2, 1) for tensor in (k, v))
        distance = torch.arange(300).unsqueeze(0) - torch.arange(300).unsqueeze(1)
        added = table.to(kind)[:, ll.RelativePosition(table, "t5").bucket(distance)]
        return (q @ k.mT * 0.25 + added).softmax(-1) @ v

    truth = torch.autograd.grad((plain(torch.float64) * weights).sum(), wanted)
    rough = torch.autograd.grad((plain(dtype).double() * weights).sum(), wanted)
    output = ll.attention(query, key, value, bias=ll.RelativePosition(table, "t5"))
    ours = torch.autograd.grad((output.double() * weights).sum(), wanted)
    for name, want, other, got in zip(["query", "key", "value", "table"], truth, rough, ours, strict=True):
        assert got.dtype == want.dtype
        limit = 2 * (other.double() - want.double()).norm()
        assert (got.double() - want.double()).norm() <= limit, name


def test_packed_equals_alone():
    query, key, value = make(1, 4, 2, 300, 300, 8)
    bias = relative("t5", 32)
    bounds = torch.tensor([0, 31, 31, 32, 180, 300], dtype=torch.int32)
    wanted = [query, key, value, bias.table]
    packed, lse = ll.attention(
        *(t.detach() for t in (query, key, value)), bias=bias, cu_seqlens=bounds, return_lse=True, method="exact"
    )
    grads = torch.autograd.grad(
        ll.attention(query, key, value, bias=bias, cu_seqlens=bounds).square().sum(), wanted
    )  # fmt: skip
    alone = []
    for start, stop in ((0, 31), (31, 32), (32, 180), (180, 300)):
        parts = [tensor[:, :, start:stop] for tensor in (query, key, value)]
        alone.append(ll.attention(*parts, bias=bias))
        _, want_lse = softmax_attention(check_inputs(*parts, None, 0.0, False, None, None, None, bias, True))
        torch.testing.assert_close(lse[:, :, start:stop], want_lse)
    joined = torch.cat(alone, 2)
    torch.testing.assert_close(packed, joined)
    want = torch.autograd.grad(joined.square().sum(), wanted)
    torch.testing.assert_close(grads, want)


@pytest.mark.parametrize("buckets", [32, 64, 128])
def test_t5_saturates_where_it_is_said_to(buckets):
    bias = ll.RelativePosition(torch.randn(1, buckets), "t5")
    half = buckets // 2
    exact = half // 2

    def bucket(distance):
        back = abs(distance)
        far = back if back < exact else exact + math.floor(
            math.log(back / exact) / math.log(128 / exact) * (half - exact) + 1e-9
        )  # fmt: skip
        return half * (distance > 0) + min(half - 1, far)

    distance = torch.arange(-300, 301)
    assert bias.bucket(distance).tolist() == [bucket(d) for d in distance.tolist()]
    values = bias.at(distance)[0]
    assert (values[300 + bias.reach :] == values[600]).all()
    assert (values[: 301 - bias.reach] == values[0]).all()
    assert values[300 + bias.reach - 1] != values[600]
    assert values[300 - bias.reach + 1] != values[0]
    assert {32: 91, 64: 113}.get(buckets, bias.reach) == bias.reach


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_query_or_a_bias_that_is_no_number_gives_nan_to_the_rows_that_see_it(bad):
    query, key, value = (torch.randn(1, 2, 20, 8) for _ in range(3))
    table = torch.randn(2, 7)
    table[1, 6] = torch.nan
    output, lse = ll.attention(query, key, value, bias=ll.RelativePosition(table), return_lse=True, method=PATH)
    want = ll.attention(query, key, value, bias=ll.RelativePosition(table), method="exact:blockwise")
    torch.testing.assert_close(output, want, equal_nan=True)
    assert lse.isnan().sum() == 17
    query[0, 0, 3, 2] = bad
    output = ll.attention(query, key, value, bias=ll.Alibi(2), method=PATH)
    assert output.isnan().sum() == 8
    assert ll.attention(query, key, value, bias=ll.RelativePosition(table.fill_(torch.nan)), method=PATH).isnan().all()


def test_a_bias_of_minus_infinity_masks():
    query, key, value = make(1, 2, 2, 30, 30, 8)
    table = torch.randn(2, 9, dtype=torch.float64)
    table[0, 5:] = -torch.inf  # the past alone
    table[1] = -torch.inf  # nothing at all
    output = check("exact", query, key, value, bias=ll.RelativePosition(table))
    assert not output[:, 1].any()
    _, lse = ll.attention(
        *(t.detach() for t in (query, key, value)), bias=ll.RelativePosition(table), return_lse=True, method=PATH
    )
    assert (lse[:, 1] == -torch.inf).all()


def test_second_derivatives_are_refused():
    query = torch.randn(1, 1, 6, 8, requires_grad=True)
    output = ll.attention(query, query, query, bias=ll.Alibi(1), method=PATH)
    (first,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"second derivatives.*exact:path=math"):
        first.sum().backward()


def test_explain_says_who_is_served_and_why_not():
    shape, alibi = (1, 2, 300, 16), ll.Alibi(2)

    def why_not(**arguments):
        return ll.explain(shape, **{"bias": alibi, **arguments}).why_not.get("toeplitz")

    assert why_not() is None
    assert why_not(is_causal=True, key_mask=True) is None
    assert why_not(return_lse=True) is None
    assert "gradient" in why_not(return_lse=True, requires_grad=True)[0]
    assert why_not(device="cuda") == ["only the CPU's kernel takes the bias as a view"]
    assert "mask rule" in why_not(attn_mask=ll.Window(3))[0]
    assert "softcap" in why_not(softcap=3.0)[0]
    assert "distances" in why_not(bias=torch.zeros(300, 300))[0]
    assert "distances" in why_not(bias=None)[0]
    assert "scale" in why_not(scale=0.0, key_mask=True)[0]
    assert ll.explain(shape, bias=alibi, attn_mask=ll.Window(3)).path == "blockwise"
    query = torch.randn(shape)
    with pytest.raises(UnsupportedError, match="softcap"):
        ll.attention(query, query, query, bias=alibi, softcap=2.0, method=PATH)


def test_a_users_own_bias_of_distances_is_served():
    class Wave(Bias):
        by_distance = True

        def at(self, distance):
            return (distance * 0.3).sin().unsqueeze(0).double()

        def tile(self, q, k, n):
            return ((k - q) * 0.3).sin().double()

    query, key, value = make(1, 2, 2, 40, 40, 8)
    assert ll.explain(query, bias=Wave()).path == "toeplitz"
    check("exact", query, key, value, bias=Wave())


def test_an_operator_that_fails_its_check_is_not_used(monkeypatch):
    def other(*arguments, mask=None):
        return fused_cpu_backward(*arguments, mask=None)

    fused_cpu_backward = fused_cpu.attend_cpu_backward
    fused_cpu.cpu_serves_masks.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(fused_cpu, "attend_cpu_backward", other)
            said = ll.explain((1, 2, 30, 8), bias=ll.Alibi(2))
            assert said.path == "blockwise"
            assert "operator" in said.why_not["toeplitz"][0]
    finally:
        fused_cpu.cpu_serves_masks.cache_clear()


def test_the_first_use_may_be_in_inference_mode():
    fused_cpu.cpu_serves_masks.cache_clear()
    query = torch.randn(1, 2, 30, 8)
    with torch.inference_mode():
        assert ll.explain(query, bias=ll.Alibi(2)).path == "toeplitz"
        got = ll.attention(query, query, query, bias=ll.Alibi(2))
    torch.testing.assert_close(got, ll.attention(query, query, query, bias=ll.Alibi(2), method="exact:blockwise"))


def test_a_table_for_some_heads_and_a_slope_for_all():
    bias = relative("t5", 32)
    query, key, value = make(1, 4, 4, 30, 30, 8)
    part = ll.attention(query[:, [2, 0]], key[:, [2, 0]], value[:, [2, 0]], bias=bias.of_heads([2, 0]))
    torch.testing.assert_close(part, ll.attention(query, key, value, bias=bias)[:, [2, 0]])
    assert ll.Alibi(4).of_heads([2, 0]) is None


def test_diagonal_sums():
    tile = torch.randn(3, 4, 6)
    want = torch.stack([torch.stack([matrix.diagonal(d).sum() for d in range(-3, 6)]) for matrix in tile])
    torch.testing.assert_close(diagonal_sums(tile), want)


@pytest.mark.parametrize("kind", ["clip", "t5", "t5-causal"])
def test_tiles_of_consecutive_positions_are_those_of_any(kind):
    bias = relative(kind, 33 if kind == "clip" else 32)
    q, k = torch.arange(40, 67).unsqueeze(1), torch.arange(20, 90).unsqueeze(0)
    want = bias.table[:, bias.bucket(k - q)]
    assert torch.equal(bias.tile(q, k, 100), want)
    d_tile = torch.randn(2, 4, 27, 70, dtype=torch.float64)
    grads = torch.zeros_like(bias.table), torch.zeros_like(bias.table)
    bias.accumulate(grads[:1], d_tile, q, k, 100)
    bias.accumulate(grads[1:], d_tile.flip(2), q.flip(0), k, 100)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.memory
def test_growth_is_linear_and_as_predicted():
    """N x N scores of one head alone would be 144 MiB in float32 at the larger length."""
    settings = [
        {"dtype": dtype, "causal": how == "causal", "masked": how == "masked", "backward": backward}
        for dtype in ("float32", "bfloat16")
        for how in ("plain", "causal", "masked")
        for backward in ((False, True) if dtype == "float32" else (True,))
    ]
    growths = peak_growths(
        "biased_pass:attend", [case | {"length": length} for case in settings for length in (3072, 6144)],
        path=[str(Path(__file__).parent)], warm_up={"length": 256, "backward": True}, runs=1,
    )  # fmt: skip
    for place, case in enumerate(settings):
        small, large = growths[2 * place : 2 * place + 2]
        assert large <= LINEAR * max(small, 3 * 2**20), case
        predicted = ll.explain(
            (1, 2, 6144, 32), dtype=getattr(torch, case["dtype"]), is_causal=case["causal"],
            bias=ll.RelativePosition(torch.zeros(2, 32), "t5"), key_mask=case["masked"], requires_grad=case["backward"],
        ).peak_bytes  # fmt: skip
        assert predicted / 2 <= large <= 2 * predicted, case


@pytest.mark.parametrize(("buckets", "kind", "most"), [(2, "t5", 2), (3, "t5", 128), (1, "t5-causal", 8),
                                                       (8, "t5", 2), (8, "t5-causal", 4)])  # fmt: skip
def test_buckets_that_t5_has_no_formula_for_are_refused(buckets, kind, most):
    with pytest.raises(MaskError, match=rf"expected at least \d buckets .* got {buckets} buckets and {most}"):
        ll.RelativePosition(torch.zeros(2, buckets), kind, most)
    ll.RelativePosition(torch.zeros(2, 4), kind, 128).bucket(torch.arange(-200, 200))
