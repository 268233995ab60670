"""Rollout and gradient x attention equal the products of whole matrices in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import longlens
from longlens.errors import InputError, UnsupportedError
from longlens.lens.across import relevance, relevance_map, rollout, rollout_map
from longlens.ops.inputs import check_inputs
from longlens.ops.observe import AttentionCall
from longlens.ops.reference import allowed_pairs

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "padding": {"key_mask": True},
    "packed": {"cu_seqlens": True},
    "window": {"method": longlens.Window(9)},
    "longformer, causal": {"method": longlens.Longformer(11, (0,)), "is_causal": True},
    "union with a lane": {"method": longlens.Window(9) | longlens.Dilated(4, 5)},
    "rows with nothing": {"attn_mask": longlens.Predicate(lambda b, h, q, k: (q % 3 > 0) & (k >= 0))},
    "bias": {"bias": longlens.Alibi(4)},
}


def draw_layers(case, count=3, batch=2, heads=4, kv_heads=2, tokens=90, width=8, dtype=torch.float32):
    settings = dict(CASES[case])
    if "cu_seqlens" in settings:
        batch, settings["cu_seqlens"] = 1, torch.tensor([0, 25, 26, tokens], dtype=torch.int32)
    if "key_mask" in settings:
        settings["key_mask"] = torch.arange(tokens).unsqueeze(0) < torch.tensor([[tokens - 7], [tokens]])
    return [
        AttentionCall(
            number, f"layers.{number}", 2 * torch.randn(batch, heads, tokens, width, dtype=dtype),
            torch.randn(batch, kv_heads, tokens, width, dtype=dtype),
            torch.randn(batch, kv_heads, tokens, width + 3, dtype=dtype), settings=settings,
            output_gradient=torch.randn(batch, heads, tokens, width + 3, dtype=dtype),
        )
        for number in range(count)
    ]  # fmt: skip


def dense(layer):
    """(B, H, N, N) weights in float64."""
    given = {"attn_mask": None, "is_causal": False, "key_mask": None, "bias": None, "scale": None} | dict(
        layer.settings
    )
    bounds, method = given.pop("cu_seqlens", None), given.pop("method", None)
    query, key = layer.query.double(), layer.key.double()
    inputs = check_inputs(
        query, key, key, given["attn_mask"], 0.0, given["is_causal"], given["scale"], given["key_mask"], None,
        given["bias"], False,
    )  # fmt: skip
    scores = query @ key.repeat_interleave(inputs.groups, 1).transpose(2, 3) * inputs.scale
    if inputs.bias is not None:
        place = torch.arange(inputs.keys)
        scores = scores + inputs.bias.tile(place.unsqueeze(1), place.unsqueeze(0), inputs.keys).double()
    keep = allowed_pairs(inputs, None if method in (None, "exact") else method)
    if bounds is not None:
        owner = torch.bucketize(torch.arange(inputs.keys), bounds[1:], right=True)
        keep = keep & (owner.unsqueeze(0) == owner.unsqueeze(1))
    return torch.softmax(scores.masked_fill(~keep, -torch.inf), -1).nan_to_num(0.0)


def dense_rollout(layers, residual):
    total = torch.eye(layers[0].query.shape[2], dtype=torch.float64)
    for layer in layers:
        step = (1 - residual) * dense(layer).mean(1)
        step.diagonal(dim1=1, dim2=2).add_(residual)
        total = step @ total
    return total


def dense_relevance(layers):
    total = torch.eye(layers[0].query.shape[2], dtype=torch.float64)
    for layer in layers:
        value = layer.value.double().repeat_interleave(layer.query.shape[1] // layer.value.shape[1], 1)
        gradient = layer.output_gradient.double() @ value.transpose(2, 3)
        total = total + (gradient * dense(layer)).relu().mean(1) @ total
    return total


def check(found, total, name):
    # relative to the largest: gradients' products grow from layer to layer
    scale = float(total.abs().max())
    torch.testing.assert_close(
        found.double() / scale, total / scale, rtol=1e-5, atol=1e-7, msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["rollout", "relevance"])
def test_rows_columns_and_cells(case, what):
    layers = draw_layers(case)
    if what == "rollout":
        total = dense_rollout(layers, 0.3)
        pieces, cells = (
            (lambda **k: rollout(layers, residual=0.3, **k)),
            lambda **k: rollout_map(layers, residual=0.3, **k),
        )
    else:
        total, pieces = dense_relevance(layers), lambda **k: relevance(layers, **k)
        cells = lambda **k: relevance_map(layers, **k)  # noqa: E731
    rows = pieces(queries=[4, 0, 89])
    check(rows.values, total[:, None, [4, 0, 89]], "rows")
    assert rows.queries.tolist() == [4, 0, 89]
    assert rows.keys.tolist() == list(range(90))
    columns = pieces(keys=[80, 2])
    check(columns.values, total[:, None, :, [80, 2]], "columns")
    pooled = cells(size=8)
    assert pooled.query_edges.tolist() == [*range(0, 90, 12), 90]
    sums = cells(size=8, kind="sum")
    member = torch.zeros(8, 90, dtype=torch.float64)
    member[torch.arange(90) // 12, torch.arange(90)] = 1
    check(sums.values[:, 0], member @ total @ member.T, "sums")
    counts = member.sum(1)
    check(pooled.values[:, 0], member @ total @ member.T / counts / counts.unsqueeze(1), "means")


def test_float64_is_exact_to_rounding():
    layers = draw_layers("causal", dtype=torch.float64)
    found = rollout(layers, queries=range(90))
    torch.testing.assert_close(found.values[:, 0], dense_rollout(layers, 0.5), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.values.sum(-1), torch.ones(2, 1, 90, dtype=torch.float64))


def test_bfloat16_layers_are_summed_in_float32():
    layers = draw_layers("plain", dtype=torch.bfloat16)
    found = rollout(layers, queries=[3])
    assert found.values.dtype == torch.float32
    check(found.values, dense_rollout(layers, 0.5)[:, None, [3]], "bfloat16")


def test_masked_values_do_not_count():
    layers = draw_layers("padding")
    expected = relevance(layers, queries=[1]).values
    for layer in layers:
        layer.value[0, :, -7:] = torch.nan
        layer.key[0, :, -7:] = torch.nan
    assert torch.equal(relevance(layers, queries=[1]).values[..., :-7], expected[..., :-7])


def test_lsh_follows_the_pairs_of_each_head():
    layers = [
        replace(layer, key=layer.key.repeat_interleave(2, 1), settings={"method": longlens.LSH(2, 16)})
        for layer in draw_layers("plain", batch=1)
    ]
    rows = rollout(layers, queries=[5, 60])
    torch.testing.assert_close(rows.values.sum(-1), torch.ones(1, 1, 2), rtol=1e-5, atol=1e-5)
    columns = rollout(layers, keys=[7])
    torch.testing.assert_close(columns.values[0, 0, [5, 60], 0], rows.values[0, 0, :, 7], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_recorded_and_explained(recompute):
    """The gradient's own weights: dY/dA by autograd through whole matrices of one of our models."""
    model = longlens.load("tiny").float()
    packed = model.pack(["MKTAYIAKQRQISFVKSHFSRQ", "GAVLI"])
    with torch.no_grad():
        plain = model(packed).last
    model.encoder.recompute = recompute
    with longlens.record(model) as calls:
        last = model(packed).last
        last[3].sum().backward()
    torch.testing.assert_close(last, plain)
    assert [call.name for call in calls] == [f"layers.{number}" for number in range(model.config.layers)]

    weights = []
    lengths = packed.cu_seqlens.diff().long()
    owner = torch.arange(2).repeat_interleave(lengths)

    def attend(query, key, value, *, layer, scale, cu_seqlens):
        scores = (query @ key.transpose(2, 3) * scale).masked_fill(owner.unsqueeze(0) != owner.unsqueeze(1), -torch.inf)
        p = torch.softmax(scores, -1)
        p.retain_grad()
        weights.append(p)
        return p @ value

    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_()
    model.encoder.recompute = False
    model(packed, attend=attend).last[3].sum().backward()
    total = torch.eye(len(owner))
    for p in weights:
        total = total + (p.grad * p).relu().mean(1)[0] @ total
    found = relevance(calls, queries=[3])
    torch.testing.assert_close(found.values[0, 0, 0], total[3], rtol=1e-4, atol=1e-6)
    # nothing passes between sequences
    assert not found.values[..., lengths[0] :].any()


def test_refusals():
    layers = draw_layers("plain")
    with pytest.raises(InputError, match="one of them"):
        rollout(layers)
    with pytest.raises(InputError, match=r"0\.\.89"):
        rollout(layers, queries=[90])
    with pytest.raises(InputError, match=r"0\.\.1"):
        rollout(layers, queries=[0], residual=1.5)
    with pytest.raises(InputError, match="at least one layer"):
        rollout([], queries=[0])
    with pytest.raises(InputError, match="same tokens"):
        rollout([layers[0], replace(layers[0], query=layers[0].query[:, :, 1:])], queries=[0])
    with pytest.raises(InputError, match="output_gradient"):
        relevance([replace(layers[0], output_gradient=None)], queries=[0])
    with pytest.raises(InputError, match="kind one of"):
        rollout_map(layers, kind="max")
    with pytest.raises(UnsupportedError, match="no attention weights"):
        rollout([replace(layers[0], settings={"method": "linear"})], queries=[0])
