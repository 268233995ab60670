"""explain(): says the path that attention() takes, and predicts its memory."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import longlens as ll
from longlens.errors import InputError
from longlens.ops.exact import exact as exact_module
from longlens.testing.memory import peak_growth

SHAPE = (1, 2, 300, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True},
        {"dropout_p": 0.1},
        {"return_lse": True},
        {"attn_mask": ll.Window(5)},
        {"bias": ll.Alibi(2)},
        {"key_mask": torch.ones(1, 300, dtype=torch.bool)},
        {"key_mask": torch.ones(1, 300, dtype=torch.bool), "is_causal": True},
    ],
    ids=lambda arguments: "+".join(arguments) or "plain",
)
def test_the_path_said_is_the_path_taken(arguments, dtype):
    query = torch.randn(SHAPE, dtype=dtype)
    said = ll.explain(query, **arguments)
    assert ll.explain(SHAPE, dtype=dtype, **arguments).path == said.path
    with (
        mock.patch.object(exact_module.sdpa, "attend", wraps=exact_module.sdpa.attend) as fused,
        mock.patch.object(exact_module.toeplitz, "attend", wraps=exact_module.toeplitz.attend) as biased,
        mock.patch.object(exact_module, "attend_tiles", wraps=exact_module.attend_tiles) as tiled,
    ):
        ll.attention(query, query, query, **arguments)
    called = {"sdpa": fused.called, "toeplitz": biased.called, "blockwise": tiled.called}
    assert [path for path, was in called.items() if was] == [said.path]
    assert set(said.why_not) == {"sdpa", "toeplitz", "blockwise", "flex", "math"} - {said.path}
    assert all(said.why_not.values())


def test_a_refusal_is_explained():
    said = ll.explain(SHAPE, method="nystrom", is_causal=True)
    assert said.path == "refused"
    assert said.why_not == {"nystrom": ["no causal form exists"]}
    assert said.other_methods["window"] == []
    assert "could not linformer: no causal form exists" in str(said)


def test_quadratic_memory_is_said():
    assert ll.explain(SHAPE, method="exact:math").memory == "N^2"
    assert ll.explain(SHAPE).memory == "N"


def test_the_order_on_cuda_needs_no_gpu():
    assert ll.explain(SHAPE, device="cuda").path == "sdpa"
    assert ll.explain(SHAPE, device="cuda", attn_mask=ll.Window(9)).path == "blockwise"
    assert ll.explain(SHAPE, device="cuda", attn_mask=ll.Window(9), dropout_p=0.1).path == "blockwise"
    assert ll.explain(SHAPE, device="cuda", bias=ll.Alibi(2)).path == "blockwise"


def test_wrong_shapes_are_errors_as_at_the_door():
    with pytest.raises(InputError, match="multiple"):
        ll.explain((1, 3, 5, 4), (1, 2, 5, 4))


CALLS = [
    ("exact", {}),
    ("exact", {"return_lse": True}),
    ("exact", {"dropout_p": 0.1}),
    ("window:256", {}),
    ("window:256", {"return_lse": True}),
    ("bigbird", {}),
    ("linear", {}),
    ("performer:256", {}),
    ("nystrom", {}),
    ("lsh", {}),
]


@pytest.mark.memory
@pytest.mark.parametrize(("method", "arguments"), CALLS, ids=lambda value: str(value))
def test_predicted_memory_is_near_what_is_measured(method, arguments):
    """Within a factor of two either way, forward, where the prediction is above the noise of a few MiB."""
    predicted = ll.explain((1, 8, 8192, 64), method=method, requires_grad=False, **arguments).peak_bytes
    case = {"function": "longlens:attention", "length": 8192, "heads": 8, "keywords": {"method": method, **arguments}}
    measured = peak_growth("longlens.testing.memory:attention_call", case, warm_up={"length": 128}, runs=1)
    assert predicted / 2 <= measured <= predicted * 2
