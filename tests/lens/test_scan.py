"""Every statistic of the lens equals the dense computation in float64, under every mask and method."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import longlens
from longlens.errors import InputError, LensError, UnsupportedError
from longlens.lens.collect import columns, maps, rows
from longlens.lens.scan import scan
from longlens.ops.inputs import check_inputs
from longlens.ops.masks import Rule
from longlens.ops.reference import allowed_pairs

COLLECT = (
    rows.LogSumExp(), rows.Entropy(), rows.EffectiveKeys(), rows.Largest(), rows.Distance(), rows.DistanceSpread(),
    rows.Mass(first=3), rows.Mass(window=10), rows.Mass(segments=((2, 5), (9, 12))), rows.TopKeys(8),
    columns.Received(), columns.ReceivedMean(), columns.ReceivedMax(), columns.ColumnEntropy(),
    maps.Pooled(16), maps.Pooled(16, "sum"), maps.Pooled(7, "max"), maps.DistanceHistogram(), maps.WeightHistogram(),
    maps.Cells(queries=(0, 5, 40), label="some_rows"), maps.Cells(keys=(1, 7), label="some_columns"),
)  # fmt: skip


def dense_weights(inputs, pattern=None):
    """(B, H, Nq, Nk) weights, allowed pairs and lse, in float64."""
    query, key = inputs.query.double(), inputs.key.double().repeat_interleave(inputs.groups, 1)
    scores = query @ key.transpose(2, 3) * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    if inputs.bias is not None:
        q = (torch.arange(inputs.queries) + inputs.offset).unsqueeze(1)
        scores = scores + inputs.bias.tile(q, torch.arange(inputs.keys).unsqueeze(0), inputs.keys).double()
    keep = allowed_pairs(inputs, pattern)
    scores = scores.masked_fill(~keep, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    if inputs.sinks is not None:
        lse = torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, inputs.sinks.double().view(1, -1, 1)))
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return weights, keep, lse


def dense_statistics(weights, keep, lse, offset):
    """What each collector must give, from the whole matrix."""
    nq, nk = weights.shape[2:]
    logs = torch.where(weights > 0, weights.clamp(min=1e-300).log(), 0.0)
    i, j = torch.arange(nq).unsqueeze(1) + offset, torch.arange(nk).unsqueeze(0)
    d = (i - j).abs().double()
    entropy, first = -(weights * logs).sum(-1), (weights * d).sum(-1)
    received = weights.sum(-2)
    # a sink keeps part of the mass: the spread is that of the keys' distances among themselves
    mass = weights.sum(-1).masked_fill(~keep.any(-1), 1.0)
    share = weights / received.unsqueeze(-2).clamp(min=1e-300)
    segment = (((j >= 2) & (j < 5)) | ((j >= 9) & (j < 12))).double()
    return {
        "log_sum_exp": lse, "entropy": entropy,
        "effective_keys": entropy.exp(), "distance": first,
        "distance_spread": ((weights * d * d).sum(-1) / mass - (first / mass).square()).clamp(min=0).sqrt(),
        "mass_first_3": weights[..., :3].sum(-1), "mass_window_10": (weights * (d <= 10)).sum(-1),
        "mass_segments_2_5_9_12": (weights * segment).sum(-1),
        "received": received, "received_mean": received / keep.sum(-2), "received_max": weights.amax(-2),
        "column_entropy": -(share * torch.where(share > 0, share.clamp(min=1e-300).log(), 0.0)).sum(-2),
    }  # fmt: skip


def compare(found, weights, keep, lse, offset=0, tolerance=1e-6, row_start=0):
    expected = dense_statistics(weights, keep, lse, offset)
    for name, want in expected.items():
        got = found[name].values.double()
        assert got.shape == want.shape, name
        # NaN and -inf stand in the same places
        assert torch.equal(got.isfinite(), want.isfinite()), name
        some = want.isfinite()
        # spread is a difference of squares: its error is that of the larger one
        scale = want[some].abs().max() if some.any() else 1.0
        each = 30 if name == "distance_spread" else 3
        assert torch.allclose(got[some], want[some], rtol=each * tolerance, atol=float(each * tolerance * scale)), name
    assert torch.allclose(found["some_rows"].values.double(), weights[:, :, [0, 5, 40]], rtol=1e-5, atol=1e-7)
    assert torch.allclose(found["some_columns"].values.double(), weights[..., [1, 7]], rtol=1e-5, atol=1e-7)
    for name, count in (("largest", 1), ("top_keys", 8)):
        best = torch.topk(weights.masked_fill(~keep, -1.0), min(count, weights.shape[-1])).values
        got = found[name].weight.double()[..., : best.shape[-1]]
        assert torch.allclose(got, best.clamp(min=0), rtol=1e-5, atol=tolerance), name
        index = found[name].index[..., : best.shape[-1]]
        assert torch.equal(index >= 0, best >= 0), name
        there = weights.gather(-1, index.clamp(min=0)).masked_fill(index < 0, 0.0)
        assert torch.allclose(there, got, rtol=1e-5, atol=tolerance), name
    for name in ("pooled", "pooled_sum", "pooled_max"):
        result = found[name]
        for r in range(result.values.shape[2]):
            for c in range(result.values.shape[3]):
                part = (
                    ..., slice(result.query_edges[r], result.query_edges[r + 1]),
                    slice(result.key_edges[c], result.key_edges[c + 1]),
                )  # fmt: skip
                total, pairs = weights[part].sum((-1, -2)), keep[part].sum((-1, -2))
                most = weights[part].amax((-1, -2)).masked_fill(pairs == 0, torch.nan)
                want = {"pooled": total / pairs, "pooled_sum": total, "pooled_max": most}[name]
                assert torch.allclose(result.values[:, :, r, c].double(), want, rtol=1e-5, atol=1e-7, equal_nan=True)
    histogram = found["distance_histogram"]
    assert torch.allclose(histogram.mass.sum(-1).double(), weights.sum((-1, -2)), rtol=1e-5)
    assert torch.equal(histogram.count.sum(-1).long(), keep.sum((-1, -2)))
    signed = torch.arange(weights.shape[3]).unsqueeze(0) - torch.arange(weights.shape[2]).unsqueeze(1) - offset
    zero = histogram.edges.tolist().index(-0.5)
    assert torch.allclose(histogram.mass[..., zero].double(), (weights * (signed == 0)).sum((-1, -2)), atol=1e-4)
    spread = found["weight_histogram"]
    assert torch.allclose(spread.mass.sum(-1).double(), weights.sum((-1, -2)), rtol=1e-5)
    ordered = weights.flatten(2).sort(-1, descending=True).values.cumsum(-1)
    needed = (ordered < 0.9 * ordered[..., -1:]).sum(-1) / keep.sum((-1, -2))
    assert (spread.share_for(0.9) >= needed - 1e-6).all()
    assert (spread.share_for(0.9) <= 1.6 * needed + 0.02).all()


def draw(batch=2, heads=4, nq=150, nk=150, width=16, kv_heads=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, nq, width), *[(batch, kv_heads or heads, nk, width)] * 2)
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def padding(batch, n):
    keep = torch.ones(batch, n, dtype=torch.bool)
    keep[0, n - 20 :] = False
    keep[1, :9] = False
    return keep


SINKS = torch.tensor([-1.0, 0.5, 2.0, 4.0])
NOTHING = longlens.Predicate(lambda b, h, q, k: (q % 3 > 0) & (k >= 0))

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "padding": {"key_mask": True},
    "causal and padding": {"is_causal": True, "key_mask": True},
    "bias": {"bias": longlens.Alibi(4)},
    "predicate": {"attn_mask": longlens.Predicate(lambda b, h, q, k: (q * 7 + k * 3 + h + b) % 5 > 1)},
    "window as a mask": {"attn_mask": longlens.Window(20, 5), "is_causal": True},
    "rows with nothing": {"attn_mask": NOTHING},
    "softcap": {"softcap": 3.0, "is_causal": True},
    "window": {"method": longlens.Window(17)},
    "window, causal": {"method": longlens.Window(17), "is_causal": True},
    "longformer": {"method": longlens.Longformer(20, (0, 70))},
    "bigbird": {"method": longlens.BigBird(16, 2, 1)},
    "dilated": {"method": longlens.Dilated(8, 3)},
    "strided": {"method": longlens.Strided(12)},
    "union with strided keys": {"method": longlens.Window(9) | longlens.Dilated(4, 5), "key_mask": True},
    "sinks": {"sinks": SINKS, "is_causal": True, "key_mask": True},
    "sinks, rows with nothing": {"sinks": SINKS, "attn_mask": NOTHING, "softcap": 3.0},
    "sinks, window": {"sinks": SINKS, "softcap": 3.0, "method": longlens.Window(17), "key_mask": True},
    "sinks, union with strided keys": {
        "sinks": SINKS,
        "softcap": 3.0,
        "method": longlens.Window(9) | longlens.Dilated(4, 5),
        "is_causal": True,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_every_statistic_equals_the_dense_one(case):
    given = dict(CASES[case])
    query, key, value = draw()
    if given.get("key_mask"):
        given["key_mask"] = padding(2, 150)
    method = given.pop("method", "exact")
    found = scan(query, key, collect=COLLECT, method=method, **given)
    settings = dict.fromkeys(("attn_mask", "key_mask", "bias", "softcap", "sinks")) | {"is_causal": False} | given
    inputs = check_inputs(
        query, key, value, settings["attn_mask"], 0.0, settings["is_causal"], None, settings["key_mask"], None,
        settings["bias"], False, settings["softcap"], settings["sinks"],
    )  # fmt: skip
    pattern = method if isinstance(method, Rule) else None
    if pattern is not None and inputs.key_mask is not None:
        parts = [dense_weights(part, form) for form, part in pattern.localise(inputs)]
        weights, keep, lse = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    else:
        weights, keep, lse = dense_weights(inputs, pattern.localise(inputs)[0][0] if pattern else None)
    compare(found, weights, keep, lse)


@pytest.mark.parametrize(("nq", "nk"), [(40, 130), (130, 60), (1, 77), (700, 700)])
def test_lengths_that_differ_and_grouped_heads(nq, nk):
    query, key, value = draw(1, 4, nq, nk, kv_heads=2)
    collect = [c for c in COLLECT if not isinstance(c, maps.Cells)]
    for causal in (False, True):
        found = scan(query, key, collect=collect, is_causal=causal)
        inputs = check_inputs(query, key, value, None, 0.0, causal, None, None, None, None, False)
        weights, keep, lse = dense_weights(inputs)
        expected = dense_statistics(weights, keep, lse, inputs.offset)
        for name in ("entropy", "distance", "received", "received_mean", "column_entropy", "log_sum_exp"):
            got, want = found[name].values.double(), expected[name]
            assert torch.equal(got.isfinite(), want.isfinite()), name
            some = want.isfinite()
            limit = 3e-6 * max(1.0, float(want[some].abs().max()))
            assert torch.allclose(got[some], want[some], rtol=3e-6, atol=limit), name


def test_packed_sequences_are_scanned_apart():
    lengths = [30, 1, 90]
    query, key, _ = draw(1, 3, sum(lengths), sum(lengths))
    bounds = torch.tensor([0, 30, 31, 121], dtype=torch.int32)
    names = ("entropy", "distance", "received", "received_max", "top_keys", "mass_first_3")
    collect = [c for c in COLLECT if c.name in names]
    found = scan(query, key, collect=collect, cu_seqlens=bounds, is_causal=True)
    for start, stop in pairwise(bounds.tolist()):
        alone = scan(query[:, :, start:stop], key[:, :, start:stop], collect=collect, is_causal=True)
        for name in names:
            if name == "top_keys":
                index = found[name].index[:, :, start:stop]
                assert torch.equal(torch.where(index >= 0, index - start, index), alone[name].index)
            else:
                assert torch.allclose(found[name].values[:, :, start:stop], alone[name].values)


def test_lsh_shows_the_pairs_that_share_a_bucket():
    query, key, value = draw(1, 2, 200, 200)
    method = longlens.LSH(2, 16)
    collect = [rows.Entropy(), rows.LogSumExp(), rows.Mass(window=300), columns.Received()]
    found = scan(query, key, collect=collect, method=method)
    output, lse = longlens.attention(query, key, value, method=method, return_lse=True)
    assert torch.allclose(found["log_sum_exp"].values, lse)
    assert torch.allclose(found["mass_window_300"].values, torch.ones(1, 2, 200), atol=1e-5)
    assert torch.allclose(found["received"].values.sum(-1), torch.full((1, 2), 200.0), atol=1e-3)
    scan(query, key, value=value, output=output, collect=collect, method=method)


def test_top_queries():
    query, key, value = draw(2, 3, 90, 70)
    found = scan(query, key, collect=[columns.TopQueries(5)], is_causal=True)["top_queries"]
    inputs = check_inputs(query, key, value, None, 0.0, True, None, None, None, None, False)
    weights, keep, _ = dense_weights(inputs)
    best = torch.topk(weights.masked_fill(~keep, -1.0), 5, -2).values.transpose(2, 3)
    assert torch.allclose(found.weight.double(), best.clamp(min=0), rtol=1e-5, atol=1e-7)
    assert torch.equal(found.index >= 0, best >= 0)


def test_half_precision_is_measured_in_float32():
    query, key, _ = draw(1, 2, 100, 100, dtype=torch.bfloat16)
    found = scan(query, key, collect=[rows.Entropy(), columns.Received()])
    wide = scan(query.float(), key.float(), collect=[rows.Entropy(), columns.Received()])
    assert found["entropy"].values.dtype == torch.float32
    assert torch.equal(found["entropy"].values, wide["entropy"].values)
    assert torch.equal(found["received"].values, wide["received"].values)


def test_states_merge():
    """Two states that saw the halves of the queries, merged, give what one gives that saw all."""
    from longlens.lens.block import Extent
    from longlens.lens.padded import scan_shape
    from longlens.lens.scan import _blocks, _Part

    query, key, value = draw(1, 2, 128, 128)
    inputs = check_inputs(query, key, value, None, 0.0, False, None, None, None, None, False)
    extent = Extent(1, 2, 128, 128, torch.float32, query.device)
    collect = (*COLLECT, columns.TopQueries(3))
    halves = [{c.name: c.start(extent) for c in collect} for _ in range(2)]
    whole = scan(query, key, collect=collect)
    for block in _blocks(_Part(longlens.Exact(), inputs, 0, 0, 0, 128), 4, torch.float32, scan_shape("cpu")):
        for state in halves[block.rows.start >= 64].values():
            state.update(block)
    for name, state in halves[0].items():
        state.merge(halves[1][name])
        merged = state.result()
        for field, want in vars(whole[name]).items():
            if isinstance(want, torch.Tensor) and want.is_floating_point():
                assert torch.allclose(getattr(merged, field), want, atol=1e-6, equal_nan=True), (name, field)


@pytest.mark.parametrize(
    ("change", "caught"),
    [({}, False), ({"scale": 0.3}, True), ({"is_causal": True}, True), ({"key_mask": True}, True), ({"roll": 1}, True)],
)
def test_the_check_against_the_modules_output(change, caught):
    query, key, value = draw(2, 4, 150, 150, kv_heads=2)
    output = longlens.attention(query, key, value)
    change = dict(change)
    if change.get("key_mask"):
        change["key_mask"] = padding(2, 150)
    value = value.roll(change.pop("roll", 0), 1)
    given = {"collect": [rows.Entropy()], "value": value, "output": output, "where": "layer 3", **change}
    if caught:
        with pytest.raises(LensError, match="layer 3"):
            scan(query, key, **given)
    else:
        scan(query, key, **given)


@pytest.mark.parametrize("method", ["performer", "linear", "nystrom", "cosformer", "taylor", "linformer:16"])
def test_a_method_without_weights_is_refused(method):
    query, key, _ = draw(1, 2, 40, 40)
    with pytest.raises(UnsupportedError, match="exact, window"):
        scan(query, key, collect=[rows.Entropy()], method=method)


def test_refusals():
    query, key, _ = draw(1, 2, 40, 40)
    with pytest.raises(InputError, match="different names"):
        scan(query, key, collect=[rows.TopKeys(2), rows.TopKeys(3)])
    with pytest.raises(InputError, match="one of first, window and segments"):
        rows.Mass()
    with pytest.raises(InputError, match="N x N"):
        maps.Cells()
    with pytest.raises(InputError, match=r"0\.\.39"):
        scan(query, key, collect=[maps.Cells(queries=(40,))])


def test_sinks_take_part_of_the_mass():
    query, key, value = draw(1, 2, 30, 30)
    sinks = torch.tensor([0.5, 2.0])
    found = scan(query, key, collect=[rows.LogSumExp(), rows.Mass(window=100)], sinks=sinks)
    inputs = check_inputs(query, key, value, None, 0.0, False, None, None, None, None, False)
    _, _, lse = dense_weights(inputs)
    whole = torch.logaddexp(lse, sinks.double().view(1, 2, 1))
    assert torch.allclose(found["log_sum_exp"].values.double(), whole, rtol=1e-6)
    assert torch.allclose(found["mass_window_100"].values.double(), (lse - whole).exp(), rtol=1e-5)


def test_results_become_tables_files_and_figures(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot as plt
    from pyarrow import parquet

    query, key, _ = draw(2, 3, 60, 60)
    for name, result in scan(query, key, collect=(*COLLECT, columns.TopQueries(2)), is_causal=True).items():
        table = result.columns()
        assert len({len(column) for column in table.values()}) == 1
        read = parquet.read_table(result.save(tmp_path / f"{name}.parquet"))
        assert read.column_names == list(table)
        assert result.save(tmp_path / f"{name}.npz").stat().st_size > 0
        plt.close(result.plot().figure)
        with pytest.raises(InputError, match="parquet"):
            result.save(tmp_path / "x.txt")


def test_a_wrong_inverse_would_be_seen():
    """The comparison itself can fail: a tenth of a percent in one statistic is found."""
    query, key, value = draw(1, 2, 60, 60)
    found = scan(query, key, collect=COLLECT)
    inputs = check_inputs(query, key, value, None, 0.0, False, None, None, None, None, False)
    found["entropy"] = replace(found["entropy"], values=found["entropy"].values * 1.001)
    with pytest.raises(AssertionError, match="entropy"):
        compare(found, *dense_weights(inputs))
