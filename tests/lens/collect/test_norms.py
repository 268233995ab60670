"""Weights times what they move equal the dense norms in float64."""

from __future__ import annotations

import pytest
import torch

import longlens
from longlens.errors import InputError, UnsupportedError
from longlens.lens.collect import columns, maps, rows
from longlens.lens.collect.norms import JointNorm, NormWeighted, value_norms
from longlens.lens.padded import SHAPES, ScanShape
from longlens.lens.scan import scan

COLLECT = (
    columns.Received(), columns.ReceivedMean(), columns.ReceivedMax(), columns.TopQueries(3), rows.TopKeys(4),
    rows.Largest(), rows.Mass(window=5), maps.Pooled(10), maps.Pooled(7, "max"), maps.Pooled(7, "sum"),
    maps.Cells(queries=(0, 5)),
)  # fmt: skip
SETTINGS = {
    "plain": {},
    "causal": {"is_causal": True},
    "padding": {"key_mask": True},
    "window": {"method": "window:9"},
    "union": {"method": longlens.Window(9) | longlens.Dilated(4, 5)},
    "rows with nothing": {"attn_mask": longlens.Predicate(lambda b, h, q, k: (q % 3 > 0) & (k >= 0))},
}
TOKENS, HEADS, KV, WIDTH, MODEL = 90, 4, 2, 8, 24


def draw():
    query, key = 2 * torch.randn(2, HEADS, TOKENS, WIDTH), torch.randn(2, KV, TOKENS, WIDTH)
    return query, key, torch.randn(2, KV, TOKENS, WIDTH + 1), torch.randn(MODEL, HEADS * (WIDTH + 1))


def moved(value, projection):
    """(B, H, N, d): W_h v_j in float64."""
    value = value.double().repeat_interleave(HEADS // KV, 1)
    return torch.einsum("dhx,bhnx->bhnd", projection.double().unflatten(1, (HEADS, -1)), value)


def settings_of(case):
    given = dict(SETTINGS[case])
    if given.get("key_mask"):
        given["key_mask"] = torch.arange(TOKENS).unsqueeze(0) < torch.tensor([[TOKENS - 9], [TOKENS]])
    return given


def compare(found, f, keep, suffix):
    """Every result from the dense f (B, H, N, N)."""

    def close(got, want):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6, equal_nan=True)

    close(found["received" + suffix].values, f.sum(-2))
    close(found["received_mean" + suffix].values, f.sum(-2) / keep.sum(-2))
    close(found["received_max" + suffix].values, f.amax(-2))
    i = torch.arange(TOKENS)
    near = (i.unsqueeze(0) - i.unsqueeze(1)).abs() <= 5
    close(found["mass_window_5" + suffix].values, (f * near).sum(-1))
    close(found["cells" + suffix].values, f[:, :, [0, 5]])
    for name, count, matrix, allowed in (
        ("largest", 1, f, keep), ("top_keys", 4, f, keep),
        ("top_queries", 3, f.transpose(2, 3), keep.transpose(2, 3)),
    ):  # fmt: skip
        best = torch.topk(matrix.masked_fill(~allowed, -1.0), count).values
        got = found[name + suffix]
        close(got.weight, best.clamp(min=0))
        assert torch.equal(got.index >= 0, best >= 0), name
        there = matrix.gather(-1, got.index.clamp(min=0)).masked_fill(got.index < 0, 0.0)
        close(got.weight, there)
    for kind, suffix_of in (("mean", "pooled"), ("max", "pooled_max"), ("sum", "pooled_sum")):
        pooled = found[suffix_of + suffix]
        for r in range(pooled.values.shape[2]):
            for c in range(pooled.values.shape[3]):
                part = (..., slice(*pooled.query_edges[r : r + 2]), slice(*pooled.key_edges[c : c + 2]))
                pairs = keep[part].sum((-1, -2))
                want = {"sum": f[part].sum((-1, -2)), "mean": f[part].sum((-1, -2)) / pairs,
                        "max": f[part].amax((-1, -2)).masked_fill(pairs == 0, torch.nan)}[kind]  # fmt: skip
                close(pooled.values[:, :, r, c], want)


def dense_weights(query, key, given):
    """(B, H, N, N) weights and allowed pairs, from the scan's own cells, which are tested against float64 elsewhere."""
    everyone = scan(query.double(), key.double(), collect=[maps.Cells(queries=tuple(range(TOKENS)))], **given)
    weights = everyone["cells"].values
    return weights, weights > 0


@pytest.mark.parametrize("case", SETTINGS)
def test_by_head_and_together(case):
    query, key, value, projection = draw()
    given = settings_of(case)
    weights, keep = dense_weights(query, key, given)
    vectors = moved(value, projection)
    norms = value_norms(value, projection)
    torch.testing.assert_close(norms.double(), vectors.norm(dim=-1), rtol=1e-5, atol=1e-6)
    found = scan(query, key, collect=[NormWeighted(c, norms) for c in COLLECT], **given)
    compare(found, weights * vectors.norm(dim=-1).unsqueeze(2), keep, "_norm")
    found = scan(query, key, collect=[JointNorm(c, value, projection) for c in COLLECT], **given)
    together = torch.einsum("bhij,bhjd->bijd", weights, vectors).norm(dim=-1).unsqueeze(1)
    compare(found, together, keep.any(1, keepdim=True), "_joint_norm")


def test_a_tile_may_be_cut_between_heads(monkeypatch):
    query, key, value, projection = draw()
    whole = scan(query, key, collect=[JointNorm(columns.Received(), value, projection)])["received_joint_norm"]
    monkeypatch.setitem(SHAPES, "cpu", ScanShape(64, 2**10, together=False))
    monkeypatch.setattr("longlens.lens.collect.norms.PAIRS", 2**9)
    parts = scan(query, key, collect=[JointNorm(columns.Received(), value, projection)])["received_joint_norm"]
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-5, atol=1e-6)


def test_norms_of_the_values_alone():
    _, _, value, _ = draw()
    assert torch.equal(value_norms(value), value.norm(dim=-1))


def test_masked_values_do_not_count():
    query, key, value, projection = draw()
    given = settings_of("padding")
    collect = lambda: [NormWeighted(columns.Received(), value_norms(value, projection))]  # noqa: E731
    clean = scan(query, key, collect=collect(), **given)["received_norm"].values
    value[0, :, -9:] = torch.nan
    assert torch.equal(scan(query, key, collect=collect(), **given)["received_norm"].values, clean)


def test_refusals():
    query, key, value, projection = draw()
    with pytest.raises(InputError, match="rows that sum to 1"):
        NormWeighted(rows.Entropy(), value_norms(value))
    with pytest.raises(InputError, match="batch, heads, keys"):
        # two key heads' norms for four query heads
        scan(query, key, collect=[NormWeighted(columns.Received(), value_norms(value))])
    with pytest.raises(InputError, match="projection"):
        value_norms(value, projection[:, 1:])
    with pytest.raises(InputError, match="batch, heads, keys"):
        scan(query, key, collect=[JointNorm(columns.Received(), value[:, :, 1:], projection)])
    key = key.repeat_interleave(2, 1)
    with pytest.raises(UnsupportedError, match="lsh"):
        scan(query, key, collect=[JointNorm(columns.Received(), value, projection)], method=longlens.LSH(2, 16))
