"""The door: what it takes, what it refuses and how it says so."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import functional as F

import longlens as ll
from longlens.errors import DtypeError, InputError, MaskError, MethodError, UnsupportedError
from longlens.ops.registry import METHOD_INFOS, parse_method

Q = torch.randn(2, 4, 6, 8)
K = torch.randn(2, 2, 5, 8)


def test_names_and_order_are_those_of_torch():
    ours = list(inspect.signature(ll.attention).parameters)
    assert ours[:7] == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"]


def test_equals_torch_where_both_define_the_result():
    torch.testing.assert_close(ll.attention(Q, Q, Q), F.scaled_dot_product_attention(Q, Q, Q))
    torch.testing.assert_close(
        ll.attention(Q, Q, Q, None, 0.0, True, 0.3), F.scaled_dot_product_attention(Q, Q, Q, None, 0.0, True, scale=0.3)
    )


WRONG = [
    ((Q[0], K, K), {}, InputError, "shape"),
    ((Q, K, K.double()), {}, DtypeError, "one dtype"),
    ((Q.int(), K.int(), K.int()), {}, DtypeError, "float32"),
    ((Q.tolist(), K, K), {}, DtypeError, "torch.Tensor"),
    ((Q[:1], K, K), {}, InputError, "batch"),
    ((Q, K, K[:, :1]), {}, InputError, "value heads"),
    ((Q[:, :3], K, K), {}, InputError, "multiple"),
    ((Q, K, K[:, :, :4]), {}, InputError, "as many keys"),
    ((Q[..., :7], K, K), {}, InputError, "width"),
    ((Q, K, K.to("meta")), {}, InputError, "one device"),
    ((Q, K, K), {"dropout_p": 1.0}, InputError, "dropout_p"),
    ((Q, K, K), {"scale": float("nan")}, InputError, "scale"),
    ((Q, K, K), {"attn_mask": torch.ones(6, 5, dtype=torch.int64)}, MaskError, "True = attend"),
    ((Q, K, K), {"attn_mask": torch.ones(5, 6, dtype=torch.bool)}, MaskError, "broadcast"),
    ((Q, K, K), {"attn_mask": "causal"}, MaskError, "rule"),
    ((Q, K, K), {"attn_mask": torch.zeros(6, 5), "bias": torch.zeros(6, 5)}, MaskError, "not both"),
    ((Q, K, K), {"bias": torch.ones(6, 5, dtype=torch.bool)}, MaskError, "attn_mask"),
    ((Q, K, K), {"bias": ll.Alibi(3)}, MaskError, r"Alibi\(4\)"),
    ((Q, K, K), {"bias": ll.RelativePosition(torch.zeros(3, 5))}, MaskError, "4 query heads"),
    ((Q, K, K), {"key_mask": torch.ones(2, 5)}, MaskError, "key_padding_mask"),
    ((Q, K, K), {"key_mask": torch.ones(2, 6, dtype=torch.bool)}, MaskError, r"\(B, Nk\) = \(2, 5\)"),
    ((Q, Q, Q), {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, MaskError, "from 0 to B N"),
    ((Q, Q, Q), {"cu_seqlens": torch.tensor([0, 5, 12], dtype=torch.int32)}, MaskError, "end of each batch row"),
    ((Q[:1], K[:1], K[:1]), {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, MaskError, "as many queries"),
    (
        (Q[:1], Q[:1], Q[:1]),
        {"cu_seqlens": torch.tensor([0, 4, 2, 6], dtype=torch.int32)},
        MaskError,
        "rise from 0 to N",
    ),
    ((Q[:1], Q[:1], Q[:1]), {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, MaskError, "N = 6"),
    ((Q[:1], Q[:1], Q[:1]), {"cu_seqlens": torch.tensor([0.0, 6.0])}, MaskError, "int32"),
    ((Q, K, K), {"method": "windw"}, MethodError, "did you mean 'window'"),
    ((Q, K, K), {"method": "window:wide=3"}, MethodError, "unknown parameter 'wide'"),
    ((Q, K, K), {"method": "window:1,2,3"}, MethodError, "at most 2 parameters"),
    ((Q, K, K), {"method": "window:3,left=4"}, MethodError, "twice"),
    ((Q, K, K), {"method": 7}, MethodError, "expected a method"),
]


@pytest.mark.parametrize(("tensors", "arguments", "error", "words"), WRONG, ids=[words for *_, words in WRONG])
def test_wrong_input_is_named(tensors, arguments, error, words):
    with pytest.raises(error, match=words):
        ll.attention(*tensors, **arguments)


def test_unknown_keywords_are_type_errors():
    with pytest.raises(TypeError, match="enable_gqa"):
        ll.attention(Q, K, K, enable_gqa=True)
    with pytest.raises(TypeError, match="positional"):
        ll.attention(Q, K, K, None, 0.0, False, None, "window")


def test_a_refusal_names_the_inputs_the_reasons_and_who_can():
    with pytest.raises(UnsupportedError) as raised:
        ll.attention(Q, K, K, method="nystrom", is_causal=True, dropout_p=0.1)
    message = str(raised.value)
    assert "query (2, 4, 6, 8)" in message
    assert "no causal form" in message
    assert "drop" in message
    assert "window" in message.splitlines()[-1]
    assert "linear" not in message.splitlines()[-1]


@pytest.mark.parametrize("entry", METHOD_INFOS, ids=lambda entry: entry.name)
def test_every_undeclared_capability_is_refused(entry):
    method = {"blocksparse": "blocksparse:((0,),)", "cosformer": "cosformer:64"}.get(entry.name, entry.name)
    for capability, arguments in {
        "causal": {"is_causal": True},
        "masks": {"attn_mask": ll.Window(2)},
        "bias": {"bias": ll.Alibi(4)},
        "dropout": {"dropout_p": 0.5},
        "lse": {"return_lse": True},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": torch.zeros(4)},
    }.items():
        if getattr(entry, capability):
            ll.attention(Q, Q, Q, method=method, **arguments)
        else:
            with pytest.raises(UnsupportedError):
                ll.attention(Q, Q, Q, method=method, **arguments)


@pytest.mark.parametrize("shape", [(0, 4, 6, 8), (2, 4, 0, 8)])
def test_no_queries(shape):
    query = torch.randn(shape, requires_grad=True)
    key = torch.randn(shape[0], 4, 5, 8)
    output, lse = ll.attention(query, key, key, return_lse=True)
    assert output.shape == shape
    assert lse.shape == shape[:3]
    output.sum().backward()
    assert query.grad.shape == shape


def test_no_keys():
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    nothing = torch.randn(2, 4, 0, 8)
    output, lse = ll.attention(query, nothing, nothing, return_lse=True)
    assert output.shape == query.shape
    assert not output.any()
    assert (lse == -torch.inf).all()
    output.sum().backward()
    assert not query.grad.any()


def test_autocast_is_honoured_as_torch_honours_it():
    with torch.autocast("cpu", torch.bfloat16):
        ours = ll.attention(Q, Q, Q, method="exact:blockwise")
        theirs = F.scaled_dot_product_attention(Q, Q, Q)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "text", ["exact", "window:256", "window:256,right=0", "performer:256", "longformer:128,global_tokens=(0,3)"]
)
def test_string_forms_print_back(text):
    assert str(parse_method(text)) == text


def test_string_forms_read_names_and_places():
    assert parse_method("window:left=3,right=0") == parse_method("window:3,0") == ll.Window(3, 0)
    assert parse_method("window:64|global:(0,)") == ll.Window(64) | ll.Global((0,))


def test_tensors_on_another_device_are_named():
    tensors = [torch.randn(1, 2, 8, 4) for _ in range(3)]
    elsewhere = {
        "key_mask": torch.ones(1, 8, dtype=torch.bool, device="meta"),
        "attn_mask": torch.ones(8, 8, dtype=torch.bool, device="meta"),
        "bias": torch.ones(8, 8, device="meta"),
    }
    for name, tensor in elsewhere.items():
        with pytest.raises(InputError, match=f"{name} on the query's device cpu, got meta"):
            ll.attention(*tensors, **{name: tensor})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_log_sum_exp_of_no_keys_has_the_dtype_of_any_other(dtype):
    query, some, none = (torch.randn(1, 2, count, 4, dtype=dtype) for count in (3, 5, 0))
    dtypes = {ll.attention(query, keys, keys, return_lse=True)[1].dtype for keys in (some, none)}
    assert len(dtypes) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_many_parts_take_one_gradient_of_full_size_each_not_many(packed):
    query, key, value = (torch.randn((1, 2, 64, 4) if packed else (8, 2, 8, 4), requires_grad=True) for _ in range(3))
    if packed:
        bounds = torch.arange(0, 65, 8, dtype=torch.int32)
        output = ll.attention(query, key, value, cu_seqlens=bounds, method="window:4")
    else:
        keep = torch.rand(8, 8) < 0.9
        output = ll.attention(query, key, value, key_mask=keep, method="strided:4")
    seen, names = [output.grad_fn], set()
    while seen:
        node = seen.pop()
        names.add(node.name())
        seen += [after for after, _ in node.next_functions if after is not None]
    # a slice's gradient is as large as what it was cut from
    assert not [name for name in names if name.startswith("Slice")]


def test_sinks_and_biases_of_an_empty_call_are_in_the_graph():
    empty, sinks, bias = torch.zeros(1, 2, 0, 8), torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    ll.attention(empty, empty, empty, sinks=sinks, bias=bias.expand(0, 0)).sum().backward()
    assert sinks.grad is not None
    assert not sinks.grad.any()
