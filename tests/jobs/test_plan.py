"""Plans: batches by a budget, predicted memory near what is measured."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from packed_pass import CONFIG

from esm_peer import esm, protein, save
from longlens.cli.plan import plan as command
from longlens.errors import InputError
from longlens.jobs.plan import Outputs, batch_bytes, make_batches, parse_bytes
from longlens.testing import peak_growths


def test_batches_hold_the_budget_in_order_and_leave_none_out():
    lengths = [5, 1, 100, 3, 8, 8, 50, 2]
    batches = list(make_batches(lengths, 30))
    assert [place for a, b in batches for place in range(a, b)] == list(range(len(lengths)))
    for a, b in batches:
        assert b - a == 1 or sum(length + 2 for length in lengths[a:b]) <= 30
    assert list(make_batches([], 30)) == []


@pytest.mark.parametrize(
    ("text", "count"), [("16G", 2**34), ("1.5g", 3 * 2**29), ("800MiB", 800 * 2**20), ("4096", 4096)]
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "lots", "-3G", "G"])
def test_amounts_that_are_none(text):
    with pytest.raises(InputError, match="16G or 800M"):
        parse_bytes(text)


def growths(*cases: list[int]) -> list[int]:
    here = str(Path(__file__).parent)
    return peak_growths("packed_pass:packed_pass", [{"lengths": case} for case in cases], path=[here],
                        warm_up={"lengths": [64]}, runs=1)  # fmt: skip


@pytest.mark.memory
def test_memory_is_linear_and_near_what_was_predicted():
    cases = [[5000], [10_000], [20_000], [400] * 50]
    found = growths(*cases)
    for smaller, larger in pairwise(found[:3]):
        assert larger <= 2.1 * smaller
    for case, growth in zip(cases, found, strict=True):
        predicted = batch_bytes(CONFIG, sum(case) + 2 * len(case), 4, Outputs(0, 0))
        assert 0.6 * predicted <= growth <= 1.05 * predicted


def test_the_command_says_memory_time_and_the_standard_way(tmp_path):
    folder = save(esm(2, 32, 4), tmp_path / "model")
    (tmp_path / "p.fasta").write_text(f">short\nMK\n>long one\n{protein(500, 0)}\n")
    result = CliRunner().invoke(command, [str(tmp_path / "p.fasta"), "--model", str(folder)], catch_exceptions=False)
    for words in (
        "2, 502 residues, longest 500 (long)",
        "3.8 MiB for one layer",
        "7.7 MiB for all layers",
        "fits",
        "yes",
    ):
        assert words in result.output, result.output
