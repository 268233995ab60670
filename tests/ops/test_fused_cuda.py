"""Fused attention on CUDA without a GPU: the operators by their shapes, and our use of them by what stands in for them
on a CPU. The tests at the end are the same on a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from compare import make as make_leaves
from torch.nn import functional as F

import longlens
from longlens.errors import UnsupportedError
from longlens.ops import fused_cuda
from longlens.ops.bounds import bounds_of, know_bounds
from longlens.ops.exact import packed, sdpa
from longlens.ops.exact.exact import choose_path
from longlens.ops.inputs import check_inputs
from longlens.ops.reference import softmax_attention
from longlens.ops.run import run_attention

LENGTHS = (1, 40, 7, 33)
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def make(*shape):
    return [tensor.detach() for tensor in make_leaves(*shape)]


def on_cuda(*tensors, **given):
    """Inputs that are taken for a GPU's."""
    order = ("attn_mask", "dropout_p", "is_causal", "scale", "key_mask", "cu_seqlens", "bias", "return_lse")
    usual = {"dropout_p": 0.0, "is_causal": False, "return_lse": False}
    inputs = check_inputs(*tensors, *(given.get(name, usual.get(name)) for name in order))
    return replace(inputs, assumed_device="cuda")


# ---- what stands in for the operators


def dense(query, key, value, scale, causal, bias=None):
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query.float() @ key.float().mT * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[2:], dtype=torch.bool).tril(), -torch.inf)
    return (torch.softmax(scores, -1) @ value.float()).to(query.dtype), torch.logsumexp(scores, -1)


def by_sequence(query, key, value, bounds, scale, causal):
    parts = [
        dense(*(tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value)), scale, causal)
        for start, stop in pairwise(bounds.tolist())
    ]
    return torch.cat([part[0][0].transpose(0, 1) for part in parts]), [part[1][0] for part in parts]


def flash(query, key, value, scale, causal):
    assert query.shape[3] % 8 == key.shape[3] % 8 == value.shape[3] % 8 == 0
    return dense(query, key, value, scale, causal)


def cudnn(query, key, value, scale, causal):
    output, lse = dense(query, key, value, scale, causal)
    return output, lse.unsqueeze(3)


def efficient(query, key, value, bias, scale, causal):
    assert key.shape[1] == query.shape[1]
    assert bias is None or (bias.stride(0) % 16 == 0 and bias.shape == (*query.shape[:3], key.shape[2]))
    output, lse = dense(query, key, value, scale, causal, bias)
    return output, F.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)


def flash_packed(query, key, value, bounds, longest, scale, causal):
    assert query.shape[2] % 8 == 0
    assert bounds.dtype == torch.int32
    assert longest == int(bounds.diff().max())
    output, lses = by_sequence(query, key, value, bounds, scale, causal)
    return output, torch.cat(lses, 1)


def efficient_packed(query, key, value, bounds, longest, scale, causal, keep):
    output, lses = by_sequence(query[0], key[0], value[0], bounds, scale, causal)
    rows = longest + -longest % 32
    return output[None], torch.stack([F.pad(lse, (0, rows - lse.shape[1]), value=torch.inf) for lse in lses])


@pytest.fixture
def stand_ins(monkeypatch):
    """The operators' stand-ins; returns the names of those that were called."""
    called = []

    def recorded(name, function):
        def run(*arguments):
            called.append(name)
            return function(*arguments)

        return run

    for function in (flash, cudnn, efficient, flash_packed, efficient_packed):
        monkeypatch.setattr(fused_cuda, f"_{function.__name__}", recorded(function.__name__, function))
    fused_cuda.gives_lse.cache_clear()
    fused_cuda.packs.cache_clear()
    yield called
    fused_cuda.gives_lse.cache_clear()
    fused_cuda.packs.cache_clear()


def close(got, want, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


# ---- dense, with the log-sum-exp


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_log_sum_exp_comes_with_the_output(kernel, causal, stand_ins, monkeypatch):
    monkeypatch.setattr(sdpa, "_cuda_kernel", lambda inputs: kernel)
    tensors = [tensor.float() for tensor in make(2, 3, 3, 45, 45, 12)]
    inputs = on_cuda(*tensors[:2], tensors[2][..., :9], is_causal=causal, return_lse=True)
    assert choose_path(inputs) == "sdpa"
    out = sdpa.attend(inputs)
    want, lse = softmax_attention(on_cuda(*(tensor.double() for tensor in (*tensors[:2], tensors[2][..., :9])),
                                          is_causal=causal, return_lse=True))  # fmt: skip
    close(out.output, want, torch.float32)
    close(out.lse, lse, torch.float32)
    assert out.lse.shape == (2, 3, 45)
    assert out.lse.dtype == torch.float32
    assert set(stand_ins) == {kernel}


def test_a_key_mask_goes_to_the_efficient_kernel_and_rows_without_keys_are_told(stand_ins, monkeypatch):
    monkeypatch.setattr(sdpa, "_cuda_kernel", lambda inputs: "cudnn")
    tensors = [tensor.float() for tensor in make(2, 3, 3, 20, 45, 8)]
    keep = torch.rand(2, 45) > 0.3
    keep[1] = False
    out = sdpa.attend(on_cuda(*tensors, key_mask=keep, return_lse=True))
    want, lse = softmax_attention(on_cuda(*(tensor.double() for tensor in tensors), key_mask=keep, return_lse=True))
    close(out.output, want, torch.float32)
    close(out.lse, lse, torch.float32)
    assert (out.lse[1] == -torch.inf).all()
    assert set(stand_ins) == {"efficient"}


def test_who_serves_a_log_sum_exp(stand_ins, monkeypatch):
    monkeypatch.setattr(sdpa, "_cuda_kernel", lambda inputs: "cudnn")
    query, key = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8)
    keep = torch.ones(1, 30, dtype=torch.bool)
    assert sdpa._lse_kernel(on_cuda(query, key, key, return_lse=True)) == "cudnn"
    assert sdpa._lse_kernel(on_cuda(query, key, key, key_mask=keep, return_lse=True)) is None
    # a kernel that is absent, or gives another logarithm, is left alone
    monkeypatch.setattr(fused_cuda, "_cudnn", lambda *given: (dense(*given)[0], dense(*given)[1] / 0.6931))
    fused_cuda.gives_lse.cache_clear()
    assert sdpa._lse_kernel(on_cuda(query, key, key, return_lse=True)) == "flash"
    monkeypatch.setattr(fused_cuda, "_flash", lambda *given: torch.ops.aten._no_such_operator(*given))
    fused_cuda.gives_lse.cache_clear()
    assert sdpa._lse_kernel(on_cuda(query, key, key, return_lse=True)) is None


# ---- packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [8, 12])
def test_a_pack_is_one_launch(dtype, causal, width, stand_ins):
    tensors = [tensor.to(dtype) for tensor in make(1, 4, 4, 81, 81, width)]
    inputs = on_cuda(*tensors, cu_seqlens=BOUNDS, is_causal=causal, return_lse=True)
    out = packed.attend(inputs)
    parts = [
        softmax_attention(on_cuda(*(tensor[:, :, start:stop].double() for tensor in tensors), is_causal=causal,
                                  return_lse=True))
        for start, stop in pairwise(BOUNDS.tolist())
    ]  # fmt: skip
    close(out.output, torch.cat([part[0] for part in parts], 2), dtype)
    close(out.lse, torch.cat([part[1] for part in parts], 2), torch.float32 if dtype == torch.float32 else dtype)
    assert out.output.shape == tensors[0].shape
    assert out.lse.shape == (1, 4, 81)
    assert stand_ins == ["efficient_packed" if dtype == torch.float32 else "flash_packed"]


def test_attention_takes_the_pack_where_it_is_served(stand_ins, monkeypatch):
    tensors = [tensor.bfloat16() for tensor in make(1, 4, 2, 81, 81, 8)]
    monkeypatch.setattr(
        "longlens.ops.run.check_inputs", lambda *given: on_cuda(*given[:3], cu_seqlens=given[8], is_causal=given[5])
    )
    given = {"key_mask": None, "bias": None, "softcap": None, "sinks": None, "cu_seqlens": BOUNDS}
    run_attention(*tensors, None, 0.0, False, None, method="exact", return_lse=False, **given)
    assert stand_ins == ["flash_packed"]
    # what lies behind a causal mask and is not finite must not be multiplied by 0
    tensors[2][0, 0, 20] = torch.nan
    stand_ins.clear()
    monkeypatch.setattr(sdpa, "_cuda_kernel", lambda inputs: "flash")
    output = run_attention(*tensors, None, 0.0, True, None, method="exact", return_lse=False, **given)
    assert stand_ins == []
    assert output[0, 0, 1:20].isfinite().all()
    assert output[0, 0, 20:41].isnan().any(-1).all()
    assert output[0, 0, 41:].isfinite().all()


def test_which_packs_run_one_by_one():
    tensors = [torch.randn(1, 4, 81, 8) for _ in range(3)]
    halves = [tensor.half() for tensor in tensors]
    kernel = lambda *given, **more: packed.kernel_for(on_cuda(*given, **{"cu_seqlens": BOUNDS} | more))  # noqa: E731
    assert kernel(*tensors) == "efficient"
    assert kernel(*halves) == "flash"
    assert kernel(halves[0], halves[1][:, :2], halves[2][:, :2]) == "flash"
    assert kernel(tensors[0], tensors[1][:, :2], tensors[2][:, :2]) is None
    assert kernel(*tensors, key_mask=torch.ones(1, 81, dtype=torch.bool)) is None
    assert kernel(*tensors, attn_mask=longlens.Window(3)) is None
    assert kernel(*tensors, bias=longlens.Alibi(4)) is None
    assert kernel(*halves, dropout_p=0.1) is None
    assert kernel(*(tensor.double() for tensor in tensors)) is None
    assert kernel(*halves, cu_seqlens=torch.tensor([0, 5, 5, 81])) is None
    wide = torch.empty(1, 1, 81, 300, dtype=torch.half)
    assert kernel(wide, wide, wide) is None
    # one long sequence among short ones: a table of (sequences, longest) would not be linear
    short = torch.cat([torch.arange(41), torch.tensor([81])])
    assert kernel(*tensors, cu_seqlens=short, return_lse=True) is None
    assert kernel(*tensors, cu_seqlens=short) == "efficient"
    leaf = tensors[0].requires_grad_()
    assert kernel(leaf, *tensors[1:], return_lse=True) is None
    assert kernel(leaf, *tensors[1:]) == "efficient"
    assert packed.kernel_for(replace(on_cuda(*tensors, cu_seqlens=BOUNDS), assumed_device="cpu")) is None


def test_explain_knows_the_paths():
    said = longlens.explain((1, 4, 81, 8), device="cuda", dtype=torch.bfloat16, cu_seqlens=BOUNDS)
    assert said.path == "packed"
    assert set(said.why_not) == {"sdpa", "toeplitz", "blockwise", "flex", "math"}
    assert longlens.explain((1, 4, 81, 8), device="cuda", return_lse=True).path == "sdpa"
    said = longlens.explain((1, 4, 81, 8), device="cuda", return_lse=True, requires_grad=True)
    assert said.path == "blockwise"
    assert "gradient" in said.why_not["sdpa"][0]
    assert longlens.explain((1, 4, 81, 8), cu_seqlens=BOUNDS).path == "sdpa"


def test_boundaries_on_a_cpu_are_read_each_time():
    array = BOUNDS.numpy().copy()
    bounds = torch.from_numpy(array)
    assert bounds_of(bounds) == tuple(array.tolist())
    # writing through NumPy or .data changes no version
    array[1] = 2
    assert bounds_of(bounds)[1] == 2
    bounds.data[1] = 3
    assert bounds_of(bounds)[1] == 3


def test_boundaries_on_an_accelerator_are_read_once_and_again_when_written_to(monkeypatch):
    monkeypatch.setattr("longlens.ops.bounds._is_kept", lambda bounds: not bounds.is_inference())
    bounds = BOUNDS.clone()
    assert bounds_of(bounds) == tuple(BOUNDS.tolist())
    assert bounds_of(bounds) is bounds_of(bounds)
    bounds[1] = 2
    assert bounds_of(bounds)[1] == 2
    know_bounds(bounds, (0, 81))
    assert bounds_of(bounds) == (0, 81)
    with torch.inference_mode():
        seen = torch.tensor([0, 4])
        assert bounds_of(seen) == (0, 4)
        seen[1] = 5
        assert bounds_of(seen) == (0, 5)


# ---- the operators themselves, on tensors without numbers


@pytest.mark.parametrize("name", ["_flash_packed", "_efficient_packed"])
def test_packed_operators_take_these_arguments_and_have_gradients(name):
    leaves = [torch.empty(1, 81, 4, 16, dtype=torch.half, device="meta", requires_grad=True) for _ in range(3)]
    tensors = leaves if name == "_efficient_packed" else [leaf[0] for leaf in leaves]
    bounds = torch.empty(5, dtype=torch.int32, device="meta")
    more = (True,) if name == "_efficient_packed" else ()
    output, lse = getattr(fused_cuda, name)(*tensors, bounds, 40, 0.25, True, *more)
    assert output.shape == tensors[0].shape
    assert lse.shape == ((4, 4, 64) if name == "_efficient_packed" else (4, 81))
    assert not lse.requires_grad
    assert type(output.grad_fn).__name__ in ("FlashAttentionBackward0", "EfficientAttentionBackward0")


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_dense_operators_take_these_arguments(kernel):
    tensors = [torch.empty(2, 4, 45, 24, dtype=torch.half, device="meta", requires_grad=True) for _ in range(3)]
    mask = torch.empty(2, 1, 1, 45, dtype=torch.bool, device="meta") if kernel == "efficient" else None
    output, lse = fused_cuda.attend_dense(kernel, *tensors, 0.25, causal=mask is None, mask=mask)
    assert output.shape == tensors[0].shape
    assert lse.shape == (2, 4, 45)
    torch.autograd.grad(output, tensors, torch.empty_like(output))


# ---- on a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def drawn(dtype, *shape, heads=4, key_heads=None, value_width=None):
    """The same numbers as leaves on the GPU and, in float64, on the CPU."""
    batch, length, width = shape
    shapes = [(batch, heads, length, width)] + [
        (batch, key_heads or heads, length, w) for w in (width, value_width or width)
    ]
    there = [torch.randn(one, device="cuda").to(dtype) for one in shapes]
    return [one.requires_grad_() for one in there], [one.detach().double().cpu().requires_grad_() for one in there]


TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"key_mask": True}], ids=["plain", "causal", "padding"])
@pytest.mark.parametrize("width", [16, 24, 64])
def test_cuda_gives_the_log_sum_exp(dtype, arguments, width):
    there, here = drawn(dtype, 2, 300, width)
    if "key_mask" in arguments:
        keep = torch.rand(2, 300) > 0.2
        keep[1, :] = False
        arguments = {"key_mask": keep}
    moved = {name: value.cuda() if torch.is_tensor(value) else value for name, value in arguments.items()}
    with torch.no_grad():
        output, lse = longlens.attention(*there, return_lse=True, **moved)
        want, wanted = longlens.attention(*here, return_lse=True, **arguments)
    close_to(output, want, TOLERANCES[dtype])
    close_to(lse, wanted, 1e-3)
    said = longlens.explain(there[0], *there[1:], return_lse=True, requires_grad=False, **moved)
    assert said.path == "sdpa"


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(
    ("causal", "width", "more"),
    [(False, 64, {}), (True, 32, {}), (False, 20, {}), (False, 24, {"value_width": 40}), (True, 16, {"key_heads": 2})],
)
def test_cuda_packs(dtype, causal, width, more):
    lengths = (1, 2, 63, 64, 65, 127, 300)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    there, here = drawn(dtype, 1, sum(lengths), width, **more)
    output = longlens.attention(*there, cu_seqlens=bounds.cuda(), is_causal=causal)
    want = longlens.attention(*here, cu_seqlens=bounds, is_causal=causal)
    close_to(output, want, TOLERANCES[dtype])
    slope = torch.randn_like(output)
    grads = torch.autograd.grad(output, there, slope)
    wanted = torch.autograd.grad(want, here, slope.double().cpu())
    for grad, other in zip(grads, wanted, strict=True):
        close_to(grad, other, TOLERANCES[dtype])
    with torch.no_grad():
        again, lse = longlens.attention(*there, cu_seqlens=bounds.cuda(), is_causal=causal, return_lse=True)
        sums = longlens.attention(*here, cu_seqlens=bounds, is_causal=causal, return_lse=True)[1]
    close_to(lse, sums, 1e-3)
    close_to(again, want.detach(), TOLERANCES[dtype])
    # by itself, and among others, as far as rounding goes; in another pack, to the bit
    last = slice(sum(lengths[:-1]), None)
    alone = longlens.attention(*(tensor[:, :, last] for tensor in there), is_causal=causal)
    close_to(alone, want[:, :, last].detach(), TOLERANCES[dtype])
    if "key_heads" not in more or dtype != torch.float32:
        other = torch.tensor([0, lengths[-2], lengths[-2] + lengths[-1]], dtype=torch.int32, device="cuda")
        cut = slice(sum(lengths[:-2]), None)
        fewer = longlens.attention(*(tensor[:, :, cut] for tensor in there), cu_seqlens=other, is_causal=causal)
        assert torch.equal(fewer, output[:, :, cut])


@pytest.mark.cuda
@on_gpu
def test_cuda_refuses_second_derivatives_of_a_pack():
    there, _ = drawn(torch.float16, 1, 81, 16)
    output = longlens.attention(*there, cu_seqlens=BOUNDS.cuda())
    (first,) = torch.autograd.grad(output.sum(), there[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        first.sum().backward()


def close_to(got, want, tolerance):
    got, want = got.detach().double().cpu(), want.detach().double()
    finite = want.isfinite()
    assert torch.equal(finite, got.isfinite())
    apart = torch.linalg.vector_norm((got - want)[finite])
    assert float(apart) <= tolerance * max(float(torch.linalg.vector_norm(want[finite])), 1e-6)
