"""Variant effects equal a literal implementation on transformers."""

from __future__ import annotations

import csv
import gzip

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import longlens
from esm_peer import esm, literal, protein, save
from longlens.cli.score import score as command
from longlens.errors import InputError, SequenceError
from longlens.io.alphabet import STANDARD
from longlens.io.variants import Mutation
from longlens.jobs.memory import process_bytes
from longlens.jobs.score_job import score as score_variants
from longlens.models.pretrained import load

WILD = protein(40, 7).replace("X", "A")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs = esm(2, 32, 4)
    save(theirs, folder)
    return theirs, load(folder), folder


def variants():
    single = [(Mutation(WILD[p], p, "W" if WILD[p] != "W" else "A"),) for p in (0, 13, 39)]
    return [*single, (single[0][0], single[2][0])]


def names(offset=1):
    return [":".join(f"{m.wild}{m.position + offset}{m.mutant}" for m in variant) for variant in variants()]


def log_p(theirs, ours, text, masked=None):
    tokens = ours.pack([text]).tokens
    if masked is not None:
        tokens[masked + 1] = 32
    return torch.log_softmax(literal(theirs, tokens)[1].double(), -1)


def by_definition(theirs, ours, variant, strategy):
    number = ours.alphabet.number
    if strategy == "pseudo-ppl":
        text = "".join({m.position: m.mutant for m in variant}.get(i, r) for i, r in enumerate(WILD))
        return sum(float(log_p(theirs, ours, text, i)[i + 1, number(r)]) for i, r in enumerate(text))
    total = 0.0
    for m in variant:
        row = log_p(theirs, ours, WILD, m.position if strategy == "masked-marginals" else None)[m.position + 1]
        total += float(row[number(m.mutant)] - row[number(m.wild)])
    return total


@pytest.mark.parametrize("strategy", ["wt-marginals", "masked-marginals", "pseudo-ppl"])
def test_scores_are_the_literal_ones(pair, strategy):
    theirs, ours, _ = pair
    wanted = [by_definition(theirs, ours, variant, strategy) for variant in variants()]
    # a small budget: the masked copies come in several packs
    found = score_variants(WILD, names(), model=ours, scoring_strategy=strategy, tokens_per_batch=100).scores
    assert np.abs(found - np.array(wanted)).max() <= 1e-5 * max(1.0, np.abs(wanted).max())


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False)


def test_a_csv_comes_back_with_a_column_more(pair, tmp_path):
    theirs, ours, folder = pair
    source = tmp_path / "variants.csv"
    source.write_text("mutant,note\n" + "".join(f"{name},n{i}\n" for i, name in enumerate(names(10))))
    run(source, "--sequence", WILD, "--model", folder, "--scoring_strategy", "wt-marginals", "--offset-idx", 10,
        "-o", tmp_path / "out.csv")  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["note"] for row in rows] == ["n0", "n1", "n2", "n3"]
    for row, variant in zip(rows, variants(), strict=True):
        assert float(row[folder.name]) == pytest.approx(by_definition(theirs, ours, variant, "wt-marginals"), abs=2e-5)


def test_all_substitutions(pair, tmp_path):
    theirs, ours, folder = pair
    result = run("--all", "--sequence", WILD, "--model", folder, "--scoring-strategy", "masked-marginals")
    rows = list(csv.DictReader(result.stdout.splitlines()))
    assert [row["wild_type"] for row in rows] == list(WILD)
    assert all(float(row[row["wild_type"]]) == 0 for row in rows if row["wild_type"] in STANDARD)
    row = log_p(theirs, ours, WILD, 13)[14]
    for residue in STANDARD:
        expected = float(row[ours.alphabet.number(residue)] - row[ours.alphabet.number(WILD[13])])
        assert float(rows[13][residue]) == pytest.approx(expected, abs=2e-5)


def test_several_proteins_by_a_column(pair, tmp_path):
    _, ours, folder = pair
    (tmp_path / "p.fasta").write_text(f">a\n{WILD}\n>b\nMKTAYI\n")
    (tmp_path / "v.csv").write_text("protein,mutant\nb,M1A\na," + f"{WILD[0]}1Y\n")
    run(tmp_path / "v.csv", "--fasta", tmp_path / "p.fasta", "--protein-col", "protein", "--model", folder,
        "-o", tmp_path / "out.csv")  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert float(rows[0][folder.name]) == pytest.approx(
        score_variants("MKTAYI", ["M1A"], model=ours).scores[0], abs=1e-5
    )


def score(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False)


def test_what_is_wrong_with_a_table_is_found_before_any_work(pair, tmp_path, monkeypatch):
    folder = pair[2]
    monkeypatch.setattr("longlens.jobs.score_job.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    table, fasta = tmp_path / "v.csv", tmp_path / "p.fasta"
    fasta.write_text(f">a\n{WILD}\n>b\n{WILD}\n")
    good = f"{WILD[0]}1{'W' if WILD[0] != 'W' else 'A'}"
    for text, words in (
        (f"mutant,id\n{good},a\n{good},b,extra\n", "line 3: expected 2 cells"),
        (f"mutant,id\n{good},a\nnonsense,b\n", "line 3: expected substitutions"),
        (f"mutant,id\n{good},c\n", "line 2: expected a protein of the FASTA"),
    ):
        table.write_text(text)
        with pytest.raises(SequenceError, match=words):
            score(table, "--fasta", fasta, "--protein-col", "id", "-m", folder)
    table.write_bytes(b"mutant\n\xff\xfe\n")
    with pytest.raises(SequenceError, match="UTF-8"):
        score(table, "--sequence", WILD, "-m", folder)
    fasta.write_text(f">a\n{WILD}\n>a\n{WILD}\n")
    table.write_text(f"mutant,id\n{good},a\n")
    with pytest.raises(SequenceError, match="more than one 'a'"):
        score(table, "--fasta", fasta, "--protein-col", "id", "-m", folder)
    for output in (tmp_path, tmp_path / "no" / "x.csv"):
        with pytest.raises(InputError, match="expected the output to be a file in a folder that exists"):
            score(table, "--sequence", WILD, "-o", output, "-m", folder)


def test_no_column_is_written_over(pair, tmp_path):
    folder = pair[2]
    table = tmp_path / "v.csv"
    table.write_text(f"mutant\n{WILD[0]}1{'W' if WILD[0] != 'W' else 'A'}\n")
    score(table, "--sequence", WILD, "-m", folder, "-o", table)
    score(table, "--sequence", WILD, "-m", folder, "-o", table, "--scoring-strategy", "wt-marginals")
    name = folder.name
    assert table.read_text().splitlines()[0] == f"mutant,{name},{name}_wt-marginals"
    with pytest.raises(SequenceError, match="already"):
        score(table, "--sequence", WILD, "-m", folder, "-o", table, "--scoring-strategy", "wt-marginals")


def test_variants_that_cannot_be_scored_are_skipped_with_a_reason(pair, tmp_path):
    folder = pair[2]
    other = "W" if WILD[0] != "W" else "A"
    table = tmp_path / "v.tsv"
    rows = [f"{WILD[0]}1{other}", f"{WILD[0]}1*", "WT", "", f"{WILD[0]}1X", f"p.{WILD[0]}1{other}"]
    table.write_text("id\tmutant\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(rows)))
    with pytest.raises(SequenceError, match=r"line 3: .* \(stop\)"):
        score(table, "--sequence", WILD, "-m", folder)
    result = score(table, "--sequence", WILD, "-m", folder, "--on-error", "skip", "-o", tmp_path / "o.tsv")
    assert result.return_value == 3
    assert "3 variants are not scored" in result.stderr
    read = list(csv.DictReader((tmp_path / "o.tsv").read_text().splitlines(), delimiter="\t"))
    assert [row["problem"] for row in read] == ["", "stop", "", "empty", "residue X", ""]
    scores = [row[folder.name] for row in read]
    assert scores[1] == scores[3] == scores[4] == ""
    assert float(scores[2]) == 0
    assert scores[0] == scores[5]
    assert float(scores[0]) != 0


def test_variants_come_by_standard_input_and_gzipped(pair, tmp_path):
    text = f"mutant\n{WILD[0]}1{'W' if WILD[0] != 'W' else 'A'}\n".encode()
    outputs = []
    for name, data in (("v.csv", text), ("v.csv.gz", gzip.compress(text))):
        (tmp_path / name).write_bytes(data)
        outputs.append(score(tmp_path / name, "--sequence", WILD, "-m", pair[2]).stdout)
        given = CliRunner().invoke(command, ["-", "--sequence", WILD, "-m", str(pair[2])], input=data)
        outputs.append(given.stdout)
    with pytest.raises(InputError, match="got both"):
        longlens.score(["-"], "-", model=pair[2])
    assert outputs[0].startswith("mutant,")
    assert set(outputs) == {outputs[0]}


def test_pseudo_ppl_of_the_wild_type_is_its_own(pair):
    _, ours, _ = pair
    same = f"{WILD[0]}1{WILD[0]}"
    scores = score_variants(WILD, ["WT", same], model=ours, scoring_strategy="pseudo-ppl").scores
    assert scores[0] == scores[1] < 0


def test_gaps_that_shift_the_numbering_are_said(pair, tmp_path):
    result = CliRunner().invoke(command, ["--all", "--sequence", "M-KT", "-m", str(pair[2])])
    assert "1 gaps are left out; positions count without them" in result.output


def test_all_substitutions_as_a_figure(pair, tmp_path):
    pytest.importorskip("matplotlib")
    folder = pair[2]
    score("--all", "--sequence", WILD, "-m", folder, "-o", tmp_path / "m.csv", "--figure")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"m.csv", "m.csv.manifest.json", "m.png"}
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    for arguments in (["--all"], [tmp_path / "m.csv", "-o", tmp_path / "n.csv"]):
        with pytest.raises(InputError, match="a figure is drawn of all substitutions"):
            score(*arguments, "--sequence", WILD, "-m", folder, "--figure")


def test_tables_that_cannot_be_read_as_they_are_meant(pair, tmp_path):
    path = tmp_path / "v.csv"
    for text, message in (
        ("mutant,DMS,DMS\nM1A,1,2\n", "'DMS' more than once"),
        ('mutant,note\nM1A,"open\n' + "x\n" * 80_000, "quotation mark"),
    ):
        path.write_text(text)
        with pytest.raises(SequenceError, match=message):
            longlens.score(WILD, path, model=pair[2])


def test_a_blank_line_of_a_single_column_is_an_empty_cell(pair, tmp_path):
    path = tmp_path / "v.csv"
    variant = f"{WILD[0]}1{'W' if WILD[0] != 'W' else 'A'}"
    path.write_text(f"mutant\n{variant}\n\n{variant}\n\n")
    with pytest.raises(SequenceError, match="line 3"):
        longlens.score(WILD, path, model=pair[2])
    scores = longlens.score(WILD, path, model=pair[2], on_error="skip")
    assert [problem != "" for problem in scores.problems] == [False, True, False]


def test_a_column_named_problem_is_the_users_own(pair, tmp_path):
    path = tmp_path / "v.csv"
    path.write_text(f"mutant,problem\n{WILD[0]}1{'W' if WILD[0] != 'W' else 'A'},hard\n")
    scores = longlens.score(WILD, path, model=pair[2])
    assert scores.skipped == 0
    assert score(path, "--sequence", WILD, "-m", pair[2]).exit_code == 0


def test_a_figure_does_not_replace_the_table(pair, tmp_path):
    with pytest.raises(InputError, match="the figure's name"):
        longlens.score(WILD, model=pair[2], output=tmp_path / "z.png", figure=True)


@pytest.mark.parametrize("strategy", ["wt-marginals", "masked-marginals"])
def test_the_wild_type_in_any_notation_scores_0(pair, strategy):
    scores = longlens.score("MKTAYIAK", ["WT", "=", "p.=", "K2=", "p.Lys2="], model=pair[1], scoring_strategy=strategy)
    assert scores.scores.tolist() == [0.0] * 5


@pytest.mark.parametrize("strategy", ["wt-marginals", "masked-marginals", "pseudo-ppl"])
def test_nothing_to_compute_is_no_error(pair, strategy):
    scores = longlens.score("MKTAYIAK", ["K9A"], model=pair[1], scoring_strategy=strategy, on_error="skip")
    assert scores.skipped == 1
    if strategy != "pseudo-ppl":
        assert longlens.score("MKTAYIAK", ["WT"], model=pair[1], scoring_strategy=strategy).scores.tolist() == [0.0]


@pytest.mark.parametrize("strategy", ["wt-marginals", "masked-marginals"])
def test_proteins_without_variants_need_no_memory(pair, tmp_path, strategy):
    (tmp_path / "v.csv").write_text("mutant,id\nK2A,a\n")
    proteins = {"a": "MKTAYIAK", "b": protein(400_000, 0)}
    limit = f"{(process_bytes() >> 20) + 300}M"
    scores = longlens.score(proteins, tmp_path / "v.csv", model=pair[1], protein_col="id", max_memory=limit,
                            scoring_strategy=strategy)  # fmt: skip
    assert len(scores.scores) == 1
