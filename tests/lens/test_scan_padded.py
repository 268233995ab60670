"""Sequences scanned together in padded rows, as on a GPU, give what each gives by itself, in launches that do not grow
with their number."""

from __future__ import annotations

import pytest
import torch

import longlens
from live_tensors import LiveTensors
from longlens.errors import LensError
from longlens.lens import padded
from longlens.lens.collect import columns, maps, rows
from longlens.lens.padded import ScanShape, sequences_together
from longlens.lens.scan import scan
from longlens.lens.watch import STANDARD

COLLECT = (
    rows.LogSumExp(), rows.Entropy(), rows.EffectiveKeys(), rows.Largest(), rows.Distance(), rows.DistanceSpread(),
    rows.Mass(first=3), rows.Mass(window=10), rows.Mass(segments=((2, 5), (9, 12))), rows.TopKeys(8),
    columns.Received(), columns.ReceivedMean(), columns.ReceivedMax(), columns.ColumnEntropy(), columns.TopQueries(3),
    maps.DistanceHistogram(), maps.WeightHistogram(),
)  # fmt: skip
LENGTHS = (1, 30, 0, 7, 30, 2, 29, 90)


def bounds_of(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Sets how a CPU scans; returns the numbers of sequences of each padded batch."""
    laid = []

    def set_to(shape):
        monkeypatch.setitem(padded.SHAPES, "cpu", shape)

    def recorded(*given):
        answer = padded.laid_together(*given)
        laid.append(answer.places.sequences)
        return answer

    monkeypatch.setattr("longlens.lens.scan.laid_together", recorded)
    return set_to, laid


def same(found, wanted):
    for name, one in found.items():
        other = wanted[name]
        for part in ("values", "weight", "mass", "count"):
            if hasattr(one, part):
                torch.testing.assert_close(
                    getattr(one, part), getattr(other, part), rtol=1e-9, atol=1e-9, equal_nan=True, msg=f"{name} {part}"
                )
        if hasattr(one, "index"):
            assert torch.equal(one.index, other.index), name


@pytest.mark.parametrize("rows_at_a_time", [16, 1024])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"is_causal": True},
        {"method": "window:5"},
        {"method": "window:5", "is_causal": True},
        {"method": "dilated:3,dilation=2"},
        {"softcap": 2.0, "sinks": torch.linspace(-1, 1, 4, dtype=torch.float64)},
    ],
    ids=lambda given: "+".join(map(str, given.values()))[:40] or "plain",
)
def test_together_as_alone(given, rows_at_a_time, like_a_gpu):
    set_to, laid = like_a_gpu
    total = sum(LENGTHS)
    # two batch rows, the second with other sequences
    bounds = torch.cat([bounds_of(*LENGTHS), total + bounds_of(60, 60, total - 120)[1:]])
    query = torch.randn(2, 4, total, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, total, 8, dtype=torch.float64)
    output = longlens.attention(query, key, value, cu_seqlens=bounds, **given)
    more = {"collect": COLLECT, "cu_seqlens": bounds, "value": value, "output": output, **given}
    alone = scan(query, key, **more)
    assert laid == []
    set_to(ScanShape(rows_at_a_time, 2**13, together=True))
    together = scan(query, key, **more)
    assert sum(laid) >= 7
    same(together, alone)
    # the check of the weights against the output is alive there too
    wrong = output.clone()
    wrong[0, :, 1:60] += 0.1
    with pytest.raises(LensError, match="own output"):
        scan(query, key, **(more | {"output": wrong}))


def test_what_depends_on_a_place_in_the_whole_runs_one_by_one(like_a_gpu):
    set_to, laid = like_a_gpu
    bounds = bounds_of(*LENGTHS)
    query, key = torch.randn(2, 1, 2, sum(LENGTHS), 8, dtype=torch.float64)
    cases = (
        ({"collect": (maps.Pooled(16), rows.Entropy())}, {}),
        ({"collect": STANDARD}, {"method": "global:(0,)"}),
        ({"collect": STANDARD}, {"bias": longlens.Alibi(2)}),
        ({"collect": STANDARD}, {"attn_mask": longlens.Window(4)}),
        ({"collect": STANDARD}, {"key_mask": torch.rand(1, sum(LENGTHS)) > 0.1}),
    )
    wanted = [scan(query, key, cu_seqlens=bounds, **collect, **more) for collect, more in cases]
    set_to(ScanShape(1024, 2**25, together=True))
    for (collect, more), before in zip(cases, wanted, strict=True):
        same(scan(query, key, cu_seqlens=bounds, **collect, **more), before)
    assert laid == []


def test_padding_that_is_not_finite_reaches_nothing(like_a_gpu):
    set_to, laid = like_a_gpu
    query, key = torch.randn(2, 1, 2, sum(LENGTHS), 8, dtype=torch.float64)
    query[0, 0, 31], key[0, 1, 33] = torch.nan, torch.inf
    collect = (rows.LogSumExp(), rows.Entropy(), columns.Received())
    alone = scan(query, key, collect=collect, cu_seqlens=bounds_of(*LENGTHS))
    set_to(ScanShape(1024, 2**25, together=True))
    same(scan(query, key, collect=collect, cu_seqlens=bounds_of(*LENGTHS)), alone)
    assert laid == [7]


def calls(lengths, collect=STANDARD):
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 8)
    output = torch.nn.functional.scaled_dot_product_attention
    parts = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
    whole = torch.cat([output(*part) for part in parts], 2)
    bounds = bounds_of(*lengths)
    with LiveTensors() as seen:
        scan(query, key, collect=collect, cu_seqlens=bounds, value=value, output=whole)
    return seen


def test_launches_do_not_grow_with_the_number_of_sequences(like_a_gpu):
    set_to, _ = like_a_gpu
    one_by_one = calls([20] * 16).calls
    set_to(ScanShape(1024, 2**22, together=True))
    few, many, mixed = calls([20] * 4).calls, calls([20] * 64).calls, calls([10, 20, 33, 40] * 16).calls
    assert many == few
    assert many < one_by_one / 8
    # padding adds the masks
    assert mixed < 1.5 * many


def test_blocks_of_a_gpu_take_few_launches(like_a_gpu):
    set_to, _ = like_a_gpu
    query, key = torch.randn(2, 2, 4, 512, 8)

    def count():
        with LiveTensors() as seen:
            scan(query, key, collect=(*STANDARD, maps.Pooled(64), maps.Pooled(64, "max")))
        return seen.calls

    cpu = count()
    set_to(ScanShape(1024, 2**25, together=True))
    assert count() < min(cpu / 4, 160)


@pytest.mark.parametrize("lengths", [[64] * 8, [16, 64, 100, 120, 5, 80]])
def test_memory_is_linear_in_the_number_of_sequences(lengths, like_a_gpu):
    set_to, _ = like_a_gpu
    set_to(ScanShape(1024, 2**14, together=True))
    small, large = calls(lengths * 4).peak, calls(lengths * 8).peak
    assert large <= 2.1 * small


def test_groups_waste_little_and_are_few():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 900, (500,), generator=generator).tolist()
    most = 2**22
    groups = sequences_together(lengths, 20, most)
    assert sorted(number for group in groups for number in group) == list(range(500))
    for group in groups:
        longest = max(lengths[number] for number in group)
        assert sum(longest**2 - lengths[number] ** 2 for number in group) * 20 <= most
        assert longest * len(group) <= 2 * sum(lengths[number] for number in group) + padded.FREE
    assert len(groups) < 120
    assert len(sequences_together([300] * 500, 20, most)) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_scans_a_pack_as_a_cpu_does(dtype):
    query, key, value = torch.randn(3, 1, 4, sum(LENGTHS), 16).to(dtype)
    bounds = bounds_of(*LENGTHS)
    there = [tensor.cuda() for tensor in (query, key, value)]
    output = longlens.attention(*there, cu_seqlens=bounds.cuda())
    found = scan(*there[:2], collect=COLLECT, cu_seqlens=bounds.cuda(), value=there[2], output=output)
    wanted = scan(query.double(), key.double(), collect=COLLECT, cu_seqlens=bounds)
    for name, one in found.items():
        if hasattr(one, "values"):
            torch.testing.assert_close(one.values.double().cpu(), wanted[name].values, rtol=2e-4, atol=2e-4)
    top, best = found["top_keys"], wanted["top_keys"]
    torch.testing.assert_close(top.weight.double().cpu(), best.weight, rtol=2e-4, atol=2e-4)
    assert torch.equal(top.index.cpu()[..., 0], best.index[..., 0])
