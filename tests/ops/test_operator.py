"""`attention` in programs that torch.compile (fullgraph=True) and torch.export make whole."""

from __future__ import annotations

import pytest
import torch

import longlens as ll
from longlens.errors import UnsupportedError

# the compiler's own imports warn of things to come in PyTorch
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

N = 48


@pytest.fixture(autouse=True)
def fresh_compiler():
    from torch import _dynamo

    _dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def results(function, tensors, wanted):
    """Output, log-sum-exp where there is one, and gradients."""
    out = function(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((part * torch.linspace(-1, 1, part.numel()).view(part.shape)).sum() for part in out)
    return [*out, *torch.autograd.grad(loss, wanted)]


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "key mask": {"key_mask": torch.arange(N).unsqueeze(0) > 5},
    "packed": {"cu_seqlens": torch.tensor([0, 20, N], dtype=torch.int32)},
}
ONLY_SOFTMAX = {
    "log-sum-exp": {"return_lse": True},
    "rules": {"attn_mask": ll.Window(4) & ll.Causal()},
    "prefix": {"attn_mask": ll.Prefix(7)},
    "documents": {"attn_mask": ll.SameDocument(torch.arange(N) // 9)},
    "tensor mask": {"attn_mask": torch.ones(N, N, dtype=torch.bool).tril(3)},
    "alibi": {"bias": ll.Alibi(2)},
    "softcap": {"softcap": 2.0},
}


@pytest.mark.parametrize(
    ("method", "case"),
    [
        (method, case)
        for method in ("exact", ll.Window(8), "window:4|global:(0,)", "linear", "lsh:2,8")
        for case in (CASES if str(method) in ("linear", "lsh:2,8") else CASES | ONLY_SOFTMAX)
    ],
    ids=str,
)
def test_a_whole_graph_gives_what_an_uncompiled_call_gives(method, case):
    arguments = (CASES | ONLY_SOFTMAX)[case]
    tensors = [torch.randn(1, 2, N, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(query, key, value):
        return ll.attention(query, key, value, method=method, **arguments)

    want = results(call, tensors, tensors)
    torch.testing.assert_close(results(compiled(call), tensors, tensors), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "argument"),
    [
        ((N, N), lambda tensor: {"bias": tensor}),
        ((2, 9), lambda table: {"bias": ll.RelativePosition(table)}),
        ((2,), lambda logits: {"sinks": logits}),
    ],
    ids=["tensor bias", "table", "sinks"],
)
def test_biases_and_sinks_have_their_gradients(shape, argument):
    learned = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tensors = [torch.randn(1, 2, N, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(query, key, value):
        return ll.attention(query, key, value, **argument(learned))

    wanted = [*tensors, learned]
    torch.testing.assert_close(results(compiled(call), tensors, wanted), results(call, tensors, wanted))


def test_other_lengths_need_no_other_program():
    def call(query):
        return ll.attention(query, query, query, is_causal=True)

    program = compiled(call, dynamic=True)
    for length in (20, 33):
        query = torch.randn(1, 2, length, 8)
        assert torch.equal(program(query), call(query))


def test_autocast_is_honoured():
    def call(query):
        return ll.attention(query, query, query)

    query = torch.randn(1, 2, N, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(call)(query)
        assert torch.equal(output, call(query))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert query.grad.dtype == torch.float32


@pytest.mark.parametrize("method", ["exact", "window:8", "linear"])
def test_exported_programs_serve_any_length(method):
    class Causal(torch.nn.Module):
        def forward(self, query):
            return ll.attention(query, query, query, is_causal=True, method=method)

    length = {"query": {2: torch.export.Dim("length", min=2, max=4096)}}
    program = torch.export.export(Causal(), (torch.randn(1, 2, N, 8),), dynamic_shapes=length).module()
    query = torch.randn(1, 2, 37, 8)
    assert torch.equal(program(query), Causal()(query))


@pytest.mark.parametrize(
    "arguments",
    [{"dropout_p": 0.1}, {"attn_mask": ll.Predicate(lambda b, h, q, k: k <= q)}],
    ids=["dropout", "a function"],
)
def test_what_cannot_be_part_of_a_program_says_so_or_stays_outside(arguments):
    def call(query):
        return ll.attention(query, query, query, **arguments)

    query = torch.randn(1, 2, N, 8)
    with pytest.raises(Exception, match=r"longlens\.attention cannot be part of a compiled program"):
        compiled(call)(query)
    torch.manual_seed(1)
    output = torch.compile(call, backend="aot_eager")(query)
    torch.manual_seed(1)
    assert torch.equal(output, call(query))


def test_a_refusal_keeps_its_words():
    def call(query):
        return ll.attention(query, query, query, is_causal=True, method="nystrom")

    with pytest.raises(Exception, match="no causal form exists") as raised:
        compiled(call)(torch.randn(1, 2, N, 8))
    assert isinstance(raised.value.__cause__, UnsupportedError)


def test_the_operator_keeps_pytorchs_rules():
    tensors = [torch.randn(1, 2, 12, 4, requires_grad=True) for _ in range(3)]
    arguments = (*tensors, None, None, None, None, None, "window:4", "", "", True, None, None, True)
    torch.library.opcheck(torch.ops.longlens.attention.default, arguments)


def test_a_floating_mask_keeps_its_gradient():
    query, key, value = (torch.randn(1, 2, N, 8) for _ in range(3))
    mask = torch.randn(N, N, requires_grad=True)

    def call(mask):
        return ll.attention(query, key, value, mask).square().sum()

    (want,) = torch.autograd.grad(call(mask), mask)
    (got,) = torch.autograd.grad(compiled(call)(mask), mask)
    torch.testing.assert_close(got, want)


def test_a_method_without_a_string_form_is_left_out_of_the_program():
    query, key, value = (torch.randn(1, 2, N, 8) for _ in range(3))
    method = ll.Linformer(3, key_projection=torch.randn(3, N))
    want = ll.attention(query, key, value, method=method)
    got = torch.compile(lambda q: ll.attention(q, key, value, method=method), backend="aot_eager")(query)
    torch.testing.assert_close(got, want)
