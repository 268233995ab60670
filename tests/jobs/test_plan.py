"""Plans: batches by a budget, predicted memory near what is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from packed_pass import CONFIG

from esm_peer import esm, protein, save
from longlens.cli.main import cli
from longlens.cli.plan import plan as command
from longlens.errors import InputError
from longlens.io.survey import survey
from longlens.jobs.embed_plan import plan_embedding
from longlens.jobs.memory import MIB, model_size, process_bytes
from longlens.jobs.plan import (
    BatchOutputs,
    batch_bytes,
    make_batches,
    masked_operations,
    measure_rate,
    operations,
    parse_bytes,
)
from longlens.models.parts.positions import LearnedPositions
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
    cases = [[8000], [16_000], [400] * 20]
    found = growths(*cases)
    assert found[1] <= 2.1 * found[0]
    for case, growth in zip(cases, found, strict=True):
        predicted = batch_bytes(CONFIG, sum(case) + 2 * len(case), 4, BatchOutputs(0, 0))
        assert 0.6 * predicted <= growth <= 1.05 * predicted


def test_the_command_says_memory_time_and_the_standard_way(tmp_path):
    folder = save(esm(2, 32, 4), tmp_path / "model")
    (tmp_path / "p.fasta").write_text(f">short\nMK\n>long one\n{protein(500, 0)}\n")
    result = CliRunner().invoke(command, [str(tmp_path / "p.fasta"), "--model", str(folder)], catch_exceptions=False)
    for words in (
        "2, 502 residues, longest 500 (long)",
        "3.8 MiB for one layer",
        "7.7 MiB for all layers",
        "for the whole process",
        "estimated from one layer",
        "fits",
        "yes",
    ):
        assert words in result.output, result.output
    assert result.exit_code == 0


def run(*arguments):
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)


def test_the_command_reads_no_weights_and_runs_no_model(tmp_path, monkeypatch):
    folder = save(esm(2, 32, 4), tmp_path / "model")
    (tmp_path / "p.fasta").write_text(f">a\n{protein(50, 0)}\n")
    for name in ("longlens.models.pretrained.load", "longlens.models.language_model.MaskedLM.forward"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("the model was loaded or run"))
    assert run(tmp_path / "p.fasta", "-m", folder).return_value == 0


def test_what_does_not_fit_is_an_exit_code(tmp_path):
    folder = save(esm(2, 32, 4), tmp_path / "model")
    (tmp_path / "p.fasta").write_text(f">a\n{protein(50, 0)}\n>b\n{protein(30_000, 0)}\n")
    fits = run(tmp_path / "p.fasta", "-m", folder, "--max-memory", "64G")
    assert fits.return_value == 0
    small = run(tmp_path / "p.fasta", "-m", folder, "--max-memory", "100M")
    assert small.return_value == 1
    assert "no: the model and PyTorch hold" in small.output
    # what is kept until it is written counts
    room = process_bytes() + 400 * MIB
    assert run(tmp_path / "p.fasta", "-m", folder, "--max-memory", room).return_value == 0
    longer = tmp_path / "q.fasta"
    longer.write_text(f">b\n{protein(400_000, 0)}\n")
    logits = run(longer, "-m", folder, "--include", "mean", "logits", "--max-memory", process_bytes() + 600 * MIB)
    assert logits.return_value == 1
    assert "q.fasta, record 1 (b), 400,000 residues" in logits.output.replace("\n", " ")
    assert run(longer, "-m", folder, "--max-memory", process_bytes() + 600 * MIB).return_value == 0


def test_masked_surprise_counts_a_pass_for_each_residue(tmp_path):
    lengths = [3, 10]
    assert masked_operations(CONFIG, lengths) == 3 * operations(CONFIG, [3]) + 10 * operations(CONFIG, [10])
    folder = save(esm(2, 32, 4), tmp_path / "model")
    (tmp_path / "p.fasta").write_text(f">a\n{protein(50, 0)}\n")
    source = survey([tmp_path / "p.fasta"])
    size = model_size(folder)
    plain, hidden = (plan_embedding(size, source, include=["surprise"], masked=masked) for masked in (False, True))
    assert hidden.operations == pytest.approx(51 * plain.operations)
    assert hidden.peak.batch > plain.peak.batch
    with pytest.raises(InputError, match="add surprise to --include"):
        run(tmp_path / "p.fasta", "-m", folder, "--surprise", "masked")


def test_a_rate_is_measured_for_every_kind_of_model():
    absolute = replace(CONFIG, positions=LearnedPositions(64), pre_norm=False)
    for config in (CONFIG, absolute):
        assert measure_rate(config, torch.float32, torch.device("cpu"), 1e8) > 0
