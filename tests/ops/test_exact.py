"""The exact method: every path against the definition."""

from __future__ import annotations

import weakref

import pytest
import torch
from compare import check, check_lse, make

import longlens
from longlens.errors import MethodError, UnsupportedError
from longlens.ops.exact import exact as exact_module
from longlens.ops.tiles import dense, grid
from longlens.ops.tiles.kernel import dropout_seed

PATHS = ["auto", "blockwise", "math"]


@pytest.fixture(params=["whole rows", "many pieces"])
def tiling(request, monkeypatch):
    """Tiles as they are, and so small that rows come in several pieces and heads in several groups."""
    if request.param == "many pieces":
        small = grid.TileShape(16, 24, 600)
        monkeypatch.setattr(exact_module, "dense_shape", lambda inputs: small)
        monkeypatch.setattr(dense, "dense_shape", lambda inputs: small)


def holes(batch: int, keys: int) -> torch.Tensor:
    mask = torch.rand(batch, keys) > 0.3
    mask[0, : keys // 4] = False
    return mask


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lengths", [(1, 1), (63, 63), (100, 100), (1, 77), (77, 100), (100, 77)])
def test_plain(path, lengths, tiling):
    check(longlens.Exact(path), *make(2, 4, 2, *lengths, 8))


@pytest.mark.parametrize("path", ["auto", "blockwise", "math"])
@pytest.mark.parametrize("lengths", [(63, 63), (1, 77), (77, 100), (100, 77)])
def test_causal_is_bottom_right(path, lengths, tiling):
    output = check(longlens.Exact(path), *make(1, 2, 1, *lengths, 8), is_causal=True)
    if lengths[0] > lengths[1]:
        assert not output[:, :, : lengths[0] - lengths[1]].any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_key_mask(is_causal, tiling):
    mask = holes(3, 70)
    mask[1] = False
    output = check("exact", *make(3, 2, 2, 70, 70, 8), key_mask=mask, is_causal=is_causal)
    assert not output[1].any()


@pytest.mark.parametrize("value_width", [1, 5, 8, 13])
def test_value_width(value_width, tiling):
    check("exact", *make(2, 2, 1, 40, 50, 8, value_width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"return_lse": True}], ids=["plain", "causal", "lse"])
def test_error_is_at_most_twice_a_plain_implementations(dtype, arguments):
    """Both against float64, forward and gradients; with many pieces too, since merging must not lose digits."""
    wide = make(1, 2, 2, 700, 700, 64)
    narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in wide]
    exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
    plain = [tensor.detach().clone().requires_grad_() for tensor in narrow]
    weights = torch.randn(1, 2, 700, 64, dtype=torch.float64)
    causal = torch.ones(700, 700, dtype=torch.bool).tril() if "is_causal" in arguments else torch.ones(700, 700).bool()

    def definition(q, k, v):
        scores = (q @ k.transpose(2, 3) * 64**-0.5).masked_fill(~causal, -torch.inf)
        return torch.softmax(scores, -1) @ v

    def door(q, k, v):
        output = longlens.attention(q, k, v, method="exact:blockwise", **arguments)
        return output[0] if isinstance(output, tuple) else output

    results = []
    for function, tensors in ((definition, exact), (definition, plain), (door, narrow)):
        output = function(*tensors)
        grads = torch.autograd.grad((output * weights.to(output.dtype)).sum(), tensors)
        results.append([output, *grads])
    for want, other, ours in zip(*results, strict=True):
        assert (ours.double() - want).norm() <= 2 * (other.double() - want).norm()


def test_log_sum_exp(tiling):
    mask = holes(2, 60)
    check_lse(*make(2, 4, 2, 50, 60, 8), is_causal=True)
    check_lse(*make(2, 4, 2, 50, 60, 8), key_mask=mask)
    query, key, value = make(2, 4, 2, 50, 60, 8)
    mask[1] = False
    _, lse = longlens.attention(query, key, value, key_mask=mask, return_lse=True)
    assert (lse[1] == -torch.inf).all()
    assert lse[0].isfinite().all()


def test_log_sum_exp_is_float32_for_half_inputs():
    query = torch.randn(1, 2, 300, 16, dtype=torch.bfloat16)
    output, lse = longlens.attention(query, query, query, return_lse=True)
    assert output.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(
    "rule",
    [
        longlens.Window(7),
        longlens.Window(7, 0) & longlens.Causal(),
        longlens.Prefix(20),
        longlens.SameDocument(torch.arange(60) // 17),
        longlens.SameDocument(torch.stack([torch.arange(60) // 17, torch.arange(60) // 9])),
        longlens.Predicate(lambda b, h, q, k: (q + k + b + h) % 3 > 0),
        longlens.Strided(5),
        longlens.BigBird(8, 1),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_rules(rule, tiling):
    check("exact", *make(2, 4, 2, 60, 60, 8), attn_mask=rule)
    check("exact", *make(2, 4, 2, 60, 60, 8), attn_mask=rule, is_causal=True, key_mask=holes(2, 60))


@pytest.mark.parametrize("shape", [(1, 1, 50, 60), (2, 4, 50, 60), (50, 60), (2, 1, 1, 60), (4, 50, 1)])
def test_tensor_masks_broadcast(shape, tiling):
    check("exact", *make(2, 4, 2, 50, 60, 8), attn_mask=torch.rand(shape) > 0.4)


@pytest.mark.parametrize("shape", [(1, 1, 50, 60), (2, 4, 50, 60), (50, 60), (2, 1, 1, 60), (4, 50, 1)])
def test_tensor_biases_have_gradients(shape, tiling):
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    check("exact", *make(2, 4, 2, 50, 60, 8), bias=bias)


def test_a_floating_mask_is_a_bias():
    query, key, value = make(1, 2, 2, 9, 9, 4)
    mask = torch.randn(9, 9, dtype=torch.float64)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(longlens.attention(query, key, value, mask), want)


@pytest.mark.parametrize("kind", ["clip", "t5", "t5-causal"])
def test_relative_positions_have_gradients(kind, tiling):
    buckets = 33 if kind == "clip" else 32
    table = torch.randn(4, buckets, dtype=torch.float64, requires_grad=True)
    bias = longlens.RelativePosition(table, kind, max_distance=40)
    check("exact:blockwise", *make(2, 4, 2, 60, 60, 8), bias=bias, is_causal=kind == "t5-causal")


def test_alibi(tiling):
    check("exact:blockwise", *make(2, 4, 2, 50, 60, 8), bias=longlens.Alibi(4))


def test_packing_equals_running_apart():
    query, key, value = make(1, 4, 2, 90, 90, 8)
    bounds = torch.tensor([0, 31, 31, 32, 90], dtype=torch.int32)
    bias = torch.randn(1, 4, 90, 90, dtype=torch.float64)
    rule = longlens.SameDocument(torch.arange(90) // 20)
    packed, lse = longlens.attention(
        query, key, value, rule, is_causal=True, cu_seqlens=bounds, bias=bias, return_lse=True
    )
    for start, stop in ((0, 31), (31, 32), (32, 90)):
        part = slice(start, stop)
        alone, alone_lse = longlens.attention(
            query[:, :, part], key[:, :, part], value[:, :, part], longlens.SameDocument(rule.documents[part]),
            is_causal=True, bias=bias[:, :, part, part], return_lse=True,
        )  # fmt: skip
        torch.testing.assert_close(packed[:, :, part], alone)
        torch.testing.assert_close(lse[:, :, part], alone_lse)


def test_dropout_is_unbiased_seeded_and_scaled():
    query, key, _ = make(1, 2, 2, 200, 200, 8)
    ones = torch.ones(1, 2, 200, 8, dtype=torch.float64)
    torch.manual_seed(1)
    first = longlens.attention(query, key, ones, dropout_p=0.3)
    torch.manual_seed(1)
    assert torch.equal(first, longlens.attention(query, key, ones, dropout_p=0.3))
    assert not torch.equal(first, longlens.attention(query, key, ones, dropout_p=0.3))
    # each output is a mean over 200 keys of weights kept with 0.7 and divided by 0.7; 400 rows of them
    assert abs(first.mean().item() - 1) < 0.02
    assert first.std().item() > 0.01


def test_dropout_gradient_uses_the_forward_mask():
    query, key, value = make(1, 2, 1, 12, 14, 4)

    def seeded(*tensors):
        torch.manual_seed(3)
        return longlens.attention(*tensors, dropout_p=0.4)

    assert torch.autograd.gradcheck(seeded, (query, key, value))


def test_second_derivatives_are_refused_or_right():
    query, key, value = make(1, 1, 1, 5, 6, 4)
    first = torch.autograd.grad(
        longlens.attention(query, key, value, return_lse=True)[0].sum(), query, create_graph=True
    )
    with pytest.raises(UnsupportedError, match="second derivatives"):
        first[0].sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda *tensors: longlens.attention(*tensors, method="exact:math"), (query, key, value)
    )


def test_wrong_path_is_named():
    with pytest.raises(MethodError, match="sdpa"):
        longlens.Exact("fastest")
    query, key, value = make(1, 1, 1, 5, 6, 4)
    with pytest.raises(UnsupportedError, match=r"path 'sdpa'.*log-sum-exp"):
        longlens.attention(query, key, value, method="exact:sdpa", return_lse=True)


# the compiler's own imports warn of things to come in PyTorch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flex_path_serves_rules():
    """Compiled FlexAttention on the CPU, forward only: the same object of rules, the same result."""
    query, key, value = (torch.randn(1, 2, 300, 16) for _ in range(3))
    mask = torch.ones(1, 300, dtype=torch.bool)
    mask[:, 290:] = False
    arguments = {"attn_mask": longlens.Window(40), "is_causal": True, "key_mask": mask}
    with torch.no_grad():
        ours = longlens.attention(query, key, value, **arguments)
        flex = longlens.attention(query, key, value, method="exact:flex", **arguments)
    torch.testing.assert_close(flex, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"is_causal": True}, {"return_lse": True}, {"dropout_p": 0.0, "attn_mask": longlens.Window(64)}],
    ids=["plain", "causal", "lse", "window"],
)
def test_cuda(dtype, arguments):
    tensors = [torch.randn(2, 4, 500, 64, device="cuda", dtype=dtype) for _ in range(3)]
    ours = longlens.attention(*tensors, **arguments)
    want = longlens.attention(*(tensor.double().cpu() for tensor in tensors), **arguments)
    ours, want = (out[0] if isinstance(out, tuple) else out for out in (ours, want))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(ours.double().cpu(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_floating_mask_of_minus_infinity_masks(return_lse):
    query, key, value = make(1, 2, 2, 64, 64, 8)
    mask = torch.zeros(64, 64, dtype=torch.float64)
    mask[3] = -torch.inf
    output = longlens.attention(query, key, value, mask, return_lse=return_lse)
    output = output[0] if return_lse else output
    torch.testing.assert_close(output, torch.nn.functional.scaled_dot_product_attention(query, key, value, mask))
    assert not output[:, :, 3].any()


@pytest.mark.parametrize("method", ["exact", "exact:path=math", "window:8"])
def test_a_row_masked_by_its_bias_has_gradients_of_0(method):
    query, key, value = (tensor.requires_grad_() for tensor in make(1, 2, 2, 24, 24, 8))
    bias = torch.zeros(24, 24, dtype=torch.float64)
    bias[10] = -torch.inf
    bias.requires_grad_()
    output = longlens.attention(query, key, value, bias=bias, method=method)
    gradients = torch.autograd.grad(output.square().sum(), (query, key, value, bias))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, :, 10].any()


@pytest.mark.parametrize("method", ["exact:blockwise", "window:8", "longformer:8", "lsh:2,8"])
def test_nothing_but_what_autograd_saves_holds_the_inputs(method):
    """Checkpointing and offloading free what they are given; what a closure holds they cannot."""
    leaves = [torch.randn(1, 2, 96, 8, requires_grad=True) for _ in range(3)]
    tensors = [leaf * 1 for leaf in leaves]
    alive = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
        output = longlens.attention(*tensors, method=method, is_causal=True)
    del tensors
    assert [storage() for storage in alive] == [None] * 3
    output.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_tiles_draw_dropout_masks_of_their_own():
    one = slice(0, 1)
    seeds = {dropout_seed(5, number, one) % 2**32 for number in (0, 1, 65_536, 2**20)}
    seeds |= {dropout_seed(5, 0, slice(1, 2)) % 2**32, dropout_seed(6, 0, one) % 2**32}
    assert len(seeds) == 6
