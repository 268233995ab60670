"""The fused path: no setting of PyTorch is touched, log-sum-exp for nothing, and the traps of the operator."""

from __future__ import annotations

import threading

import pytest
import torch
from compare import make
from torch.backends import cuda
from torch.nn import functional as F

import longlens
from longlens.errors import UnsupportedError
from longlens.ops import fused_cpu
from longlens.ops.inputs import check_inputs
from longlens.ops.reference import softmax_attention


def flags() -> tuple[bool, ...]:
    """PyTorch's process-wide choice of kernels."""
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


@pytest.mark.parametrize("method", ["exact", "window:32"])
def test_no_process_wide_flag_changes_while_a_call_runs(method, monkeypatch):
    """Whatever runs inside a call finds the flags as the caller left them: nothing for threads to race on."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(flags())
            return function(*args, **(kwargs or {}))

    before = flags()
    query = torch.randn(1, 2, 300, 16)
    with Watch():
        longlens.attention(query, query, query, method=method)
    assert seen
    assert set(seen) == {before}


@pytest.mark.parametrize("method", ["exact", "window:32"])
def test_threads_of_ours_leave_pytorch_as_it_was(method):
    """Four threads that attend, and beside them a bystander that trains with dropout and narrower values."""
    before = flags()
    failures: list[BaseException] = []

    def guarded(function):
        def run():
            try:
                for _ in range(40):
                    function()
            except BaseException as error:
                failures.append(error)

        return run

    query = torch.randn(1, 2, 256, 16)

    def ours():
        longlens.attention(query, query, query, method=method)

    def bystander():
        leaf = torch.randn(1, 2, 32, 16, requires_grad=True)
        F.scaled_dot_product_attention(leaf, leaf, leaf[..., :8], dropout_p=0.1).sum().backward()

    threads = [threading.Thread(target=guarded(function)) for function in (ours, ours, ours, ours, bystander)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert flags() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((2, 4, 2, 70, 70, 16, 16), {}),
        ((1, 2, 2, 70, 70, 16, 16), {"is_causal": True}),
        ((1, 2, 2, 70, 70, 16, 16), {"is_causal": True, "scale": -0.7}),
        ((1, 2, 2, 70, 70, 16, 16), {"is_causal": True, "scale": 0.0}),
        ((2, 4, 1, 30, 70, 8, 16), {}),
        ((1, 2, 2, 30, 70, 16, 8), {"scale": -0.7}),
        ((2, 4, 2, 70, 70, 16, 16), {"key_mask": torch.rand(2, 70) > 0.5}),
    ],
    ids=["grouped", "causal", "causal, negative scale", "causal, scale 0", "narrow keys", "narrow values", "key mask"],
)
def test_log_sum_exp_comes_from_the_fused_kernel(dtype, shape, arguments):
    query, key, value = (tensor.detach().to(dtype) for tensor in make(*shape))
    assert longlens.explain(query, key, value, return_lse=True, **arguments).path == "sdpa"
    output, lse = longlens.attention(query, key, value, return_lse=True, **arguments)
    inputs = check_inputs(
        query, key, value, None, 0.0, arguments.get("is_causal", False), arguments.get("scale"),
        arguments.get("key_mask"), None, None, True,
    )  # fmt: skip
    want, want_lse = softmax_attention(inputs)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(output.double(), want, rtol=tolerance, atol=tolerance)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    # the scores are sums in float32 even where the inputs are half
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)


def test_rows_without_keys_give_zero_and_minus_infinity():
    query = torch.randn(2, 2, 20, 8)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[1] = False
    output, lse = longlens.attention(query, query, query, key_mask=keep, return_lse=True, method="exact:sdpa")
    assert not output[1].any()
    assert (lse[1] == -torch.inf).all()
    assert lse[0].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_is_no_number_gives_nan_and_not_zero(bad, dtype):
    query, key = torch.randn(1, 2, 20, 8, dtype=dtype), torch.randn(1, 2, 20, 8, dtype=dtype)
    query[0, 1, 3, 2] = bad
    output, lse = longlens.attention(query, key, key, return_lse=True, method="exact:sdpa")
    assert output[0, 1, 3].isnan().all()
    assert lse[0, 1, 3].isnan()
    assert lse.isnan().sum() == 1
    assert output.isnan().sum() == 8


def test_a_gradient_through_the_log_sum_exp_takes_the_tiles():
    query, key, value = make(1, 2, 1, 30, 40, 8)
    explanation = longlens.explain(query, key, value, return_lse=True)
    assert explanation.path == "blockwise"
    assert explanation.why_not["sdpa"] == ["no gradient flows through its log-sum-exp"]


def test_an_operator_that_fails_its_check_is_not_used(monkeypatch):
    """The name is private to PyTorch: where it is gone or means something else, the tiles serve and explain says so."""

    def other(query, key, value, scale, **_):
        return query, torch.zeros(query.shape[:3])

    query = torch.randn(1, 2, 40, 8)
    want = longlens.attention(query, query, query, method="window:8")
    fused_cpu.cpu_serves.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(fused_cpu, "attend_cpu", other)
            explanation = longlens.explain(query)
            assert explanation.path == "blockwise"
            assert "operator" in explanation.why_not["sdpa"][0]
            torch.testing.assert_close(longlens.attention(query, query, query, method="window:8"), want)
    finally:
        fused_cpu.cpu_serves.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_second_derivatives_are_refused_in_our_words(dtype):
    query = torch.randn(1, 1, 6, 8, requires_grad=True)
    output = longlens.attention(query.to(dtype), query.to(dtype), query.to(dtype), method="exact:sdpa")
    (first,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"second derivatives.*exact:path=math"):
        first.sum().backward()
