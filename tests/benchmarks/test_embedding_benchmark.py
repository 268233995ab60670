"""The embedding benchmark: a sample that represents its file, equal work in each round, a run that goes on."""

from __future__ import annotations

import gzip
import json
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

import embedding
from embedding import CONTENDERS, OURS, completed, expected_seconds, off, page_text, summarise, work_of
from embedding_worker import batches_of
from harness import machine_line
from proteins import GROUP, Protein, draw, read

PROTEINS = Path(__file__).resolve().parents[2] / "examples" / "proteins.fasta.gz"


def made_up(count: int = 4000, seed: int = 1) -> list[Protein]:
    """Proteins with the long tail of real ones."""
    chance = random.Random(seed)
    return [Protein(f"p{n}", "A" * (10 + int(chance.lognormvariate(5.8, 0.7)))) for n in range(count)]


def lengths(proteins: list[Protein]) -> list[int]:
    return [len(protein.sequence) for protein in proteins]


# ---- the sample


def test_the_sample_is_the_same_for_the_same_file_in_any_order_and_another_for_another_seed() -> None:
    whole = made_up()
    shuffled = random.Random(9).sample(whole, len(whole))
    assert draw(whole, 6, 4, seed=0) == draw(shuffled, 6, 4, seed=0)
    assert draw(whole, 6, 4, seed=0) != draw(whole, 6, 4, seed=1)


@pytest.mark.parametrize("seed", range(5))
def test_the_sample_has_the_lengths_of_the_file(seed: int) -> None:
    whole = made_up()
    sample = [protein for turn in draw(whole, 6, 4, seed) for group in turn for protein in group]
    assert len(sample) == len({protein.id for protein in sample}) == 6 * 4 * GROUP
    assert statistics.fmean(lengths(sample)) == pytest.approx(statistics.fmean(lengths(whole)), rel=0.03)
    assert statistics.median(lengths(sample)) == pytest.approx(statistics.median(lengths(whole)), rel=0.03)


def test_a_round_has_a_group_of_neighbours_from_every_part_of_the_lengths() -> None:
    whole = sorted(made_up(), key=lambda protein: len(protein.sequence))
    quarters = [len(whole[len(whole) * part // 4].sequence) for part in range(4)]
    ordered = sorted(lengths(whole))
    for turn in draw(whole, 6, 4):
        assert len(turn) == 4
        for part, group in enumerate(turn):
            assert min(lengths(group)) >= quarters[part]
            # neighbours in the whole file: no protein of another length lies between
            between = [n for n in ordered if min(lengths(group)) < n < max(lengths(group))]
            assert len(between) <= GROUP - 2


def test_too_few_proteins_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"at least 192 proteins.*got 50; ask for fewer"):
        draw(made_up(50), 6, 4)


def test_proteins_are_read_with_their_names_without_stops(tmp_path: Path) -> None:
    fasta = tmp_path / "few.fasta.gz"
    with gzip.open(fasta, "wt") as file:
        file.write(">a one of them\nmkt\nAYI*\n>b\n\n>c\nGAVLI\n")
    assert read(fasta) == [Protein("a", "MKTAYI"), Protein("c", "GAVLI")]
    assert len(read(PROTEINS)) == 51


# ---- equal work


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_every_contender_embeds_each_protein_of_a_round_once(contender: embedding.Contender) -> None:
    groups = [[protein.sequence for protein in group] for group in draw(made_up(), 6, 4)[0]]
    batches = batches_of(groups, {"batching": contender.batching, "tokens": contender.tokens})
    assert sorted(text for batch in batches for text in batch) == sorted(text for group in groups for text in group)
    if contender.tokens:
        assert all(sum(len(text) + 2 for text in batch) <= contender.tokens or len(batch) == 1 for batch in batches)
    if contender.batching in ("mixed", "sorted"):
        assert {len(batch) for batch in batches} == {GROUP}


def row(turn: int, contender: str, seconds: float, run: str = "1", **more: Any) -> dict[str, Any]:
    return {"model": "8M", "round": turn, "run": run, "contender": contender, "seconds": seconds, "residues": 100,
            "peak_mib": 10.0, "check": 5.0, **more}  # fmt: skip


def end(turn: int, run: str = "1") -> dict[str, Any]:
    return {"model": "8M", "rates_of_round": turn, "run": run, "float32": 100.0, "bfloat16": 200.0}


def test_a_round_counts_only_when_all_were_measured_in_one_run_to_its_end() -> None:
    rows = [row(0, "a", 1.0), row(0, "b", 2.0), end(0), row(1, "a", 1.0), end(1), row(1, "b", 9.0, run="2")]
    assert list(completed(rows, "8M", ["a", "b"])) == [0]
    rows.append(row(1, "a", 3.0, run="2"))
    assert list(completed(rows, "8M", ["a", "b"])) == [0]
    rows.append(end(1, "2"))
    done = completed(rows, "8M", ["a", "b"])
    assert {turn: cells["a"]["seconds"] for turn, cells in done.items()} == {0: 1.0, 1: 3.0}
    assert completed(rows, "35M", ["a", "b"]) == {}


def test_the_ratio_is_the_median_over_rounds_and_the_rate_is_of_all_residues() -> None:
    ours, other = OURS["float32"], "transformers, one by one, float32"
    rows = []
    for turn, (own, its) in enumerate([(1.0, 2.0), (10.0, 30.0), (1.0, 2.2)]):
        rows += [row(turn, ours, own), row(turn, other, its), end(turn)]
    found = {line["contender"]: line for line in summarise(rows, [c.name for c in CONTENDERS])}
    assert found[other]["by_float32"] == {"ratio": 2.2, "ratio_low": 2.0, "ratio_high": 3.0}
    assert found[other]["residues_per_second"] == pytest.approx(300 / 34.2)
    assert found[other]["rounds"] == 3
    assert "by_bfloat16" not in found[other]


def test_a_contender_with_other_vectors_is_not_reported() -> None:
    ours, other = OURS["float32"], "transformers, one by one, float32"
    rows = [row(0, ours, 1.0), row(0, other, 2.0, check=5.02), end(0)]
    contender = next(c for c in CONTENDERS if c.name == other)
    assert "4.0e-03 apart" in off(contender, completed(rows, "8M", [ours, other]))
    (line,) = [line for line in summarise(rows, [ours, other]) if line["contender"] == other]
    assert "other vectors" in line["not_run"]
    rows[1]["check"] = 5.001
    assert off(contender, completed(rows, "8M", [ours, other])) == ""


def test_a_contender_that_failed_keeps_its_reason_and_the_others_their_rounds() -> None:
    ours, other = OURS["float32"], "transformers, one by one, float32"
    rows = [row(0, ours, 1.0), end(0)]
    rows.append({"model": "8M", "round": 0, "run": "1", "contender": other, "residues": 100, "not_run": "no memory"})
    found = {line["contender"]: line for line in summarise(rows, [ours, other])}
    assert found[other]["not_run"] == "no memory"
    assert found[ours]["residues_per_second"] == 100.0


def test_a_peer_of_a_later_run_is_compared_with_ours_of_that_run() -> None:
    ours, one, other = OURS["float32"], "transformers, one by one, float32", "esm-cpp, packed, float32"
    rows = [row(0, ours, 1.0), row(0, one, 2.0), end(0)]
    rows += [row(0, ours, 10.0, run="2"), row(0, other, 30.0, run="2", check=None), end(0, "2")]
    found = {line["contender"]: line for line in summarise(rows, [ours, one, other])}
    assert found[one]["by_float32"]["ratio"] == 2.0
    assert found[other]["by_float32"]["ratio"] == 3.0


def test_a_round_that_would_not_fit_is_foreseen_from_this_model_or_another() -> None:
    rounds = draw(made_up(), 2, 4)
    small, large = (work_of(model, rounds[0]) for model in ("8M", "35M"))
    rows = [row(0, "a", 2.0), row(0, "b", 4.0), end(0)]
    assert expected_seconds([], "8M", 0, rounds, ["a", "b"]) == 0.0
    assert expected_seconds(rows, "8M", 0, rounds, ["a", "b"]) == pytest.approx(6.0)
    assert expected_seconds(rows, "35M", 0, rounds, ["a", "b"]) == pytest.approx(6.0 * large / small)
    assert expected_seconds(rows, "8M", 0, rounds, ["a"]) == pytest.approx(2.0)
    assert large > 3 * small


# ---- a run


def test_a_dry_run_measures_goes_on_where_it_stopped_and_makes_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(PROTEINS), "--dry-run", "--out", str(tmp_path), "--threads", "1", "--only", "longlens"]
    # no round fits into no time
    embedding.main([*command, "--minutes", "0"])
    (log,) = tmp_path.glob("*.jsonl")
    assert len(log.read_text().splitlines()) == 1
    embedding.main(command)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    measured = [(line["round"], line["contender"]) for line in rows if "round" in line]
    both = set(OURS.values())
    assert {turn: {name for at, name in measured if at == turn} for turn in (0, 1)} == {0: both, 1: both}
    assert len(measured) == 4
    # the order rotates
    assert [name for _, name in measured[:2]] == [name for _, name in measured[2:]][::-1]
    # nothing is left to do
    embedding.main(command)
    assert [json.loads(line) for line in log.read_text().splitlines()] == rows
    with pytest.raises(SystemExit, match="another sample"):
        embedding.main([*command, "--seed", "1"])
    monkeypatch.setattr(embedding, "library_digest", lambda: "another version")
    with pytest.raises(SystemExit, match="version of longlens"):
        embedding.main(command)
    data = json.loads(log.with_suffix(".json").read_text())
    text = page_text(data)
    assert text.startswith(machine_line(data["machine"]))
    assert "32 proteins that represent the 51 of proteins.fasta.gz" in text
    assert re.search(r"GFLOP/s in bfloat16 and [\d,]+ in float32", text)
    assert re.search(r"\| longlens, packed, bfloat16 \| [\d,]+ \| 1\.00x \(1\.00 to 1\.00\) \| [\d.]+x \(", text)
    assert "residues_per_second" in capsys.readouterr().out
    embedding.main([*command, "--fresh", "--minutes", "0"])
    assert len(log.read_text().splitlines()) == 1
