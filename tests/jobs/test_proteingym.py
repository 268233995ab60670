"""ProteinGym's assays: columns by model, Spearman and its mean as scipy and pandas compute them, and bad input."""

from __future__ import annotations

import csv

import numpy as np
import pandas as pd
import polars as pl
import pytest
from click.testing import CliRunner
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import longlens
from esm_peer import esm, protein, save
from longlens.cli.main import cli
from longlens.errors import InputError, SequenceError
from longlens.finetuning import metrics
from longlens.io.alphabet import STANDARD
from longlens.io.proteingym import Assay
from longlens.io.results import ResultFolder
from longlens.jobs.benchmark_scores import area_under_curve, mean_and_error, rank_agreement, ranks
from longlens.models.pretrained import load


def standard(length, seed):
    return "".join("A" if residue in "XBUZO" else residue for residue in protein(length, seed))


# assay: protein, UniProt_ID, selection type, taxon
ASSAYS = {
    "A4_X_2024": (standard(30, 1), "A4", "Stability", "Human"),
    "A4_Y_2025": (standard(30, 1), "A4", "Stability", "Human"),
    "B1_X_2024": (standard(22, 2), "B1", "Stability", "Virus"),
    "C2_X_2024": (standard(18, 3), "C2", "Activity", "Human"),
}


def assay_rows(sequence, seed, count=25):
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        places = np.sort(draw.choice(len(sequence), 1 + number % 2, replace=False))
        mutants = [draw.choice([letter for letter in STANDARD if letter != sequence[place]]) for place in places]
        mutated = list(sequence)
        for place, mutant in zip(places, mutants, strict=True):
            mutated[place] = mutant
        name = ":".join(f"{sequence[place]}{place + 1}{mutant}" for place, mutant in zip(places, mutants, strict=True))
        score = draw.normal()
        rows.append({"mutant": name, "mutated_sequence": "".join(mutated), "DMS_score": round(score, 1),
                     "DMS_score_bin": int(score > 0)})  # fmt: skip
    return rows


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "DMS_ProteinGym_substitutions"
    path.mkdir()
    reference = []
    for seed, (name, (sequence, uniprot, selection, taxon)) in enumerate(ASSAYS.items()):
        pd.DataFrame(assay_rows(sequence, seed)).to_csv(path / f"{name}.csv", index=False)
        reference.append({"DMS_id": name, "DMS_filename": f"{name}.csv", "target_seq": sequence, "UniProt_ID": uniprot,
                          "coarse_selection_type": selection, "taxon": taxon})  # fmt: skip
    # an assay whose file is elsewhere
    reference.append(reference[0] | {"DMS_id": "gone", "DMS_filename": "gone.csv"})
    pd.DataFrame(reference).to_csv(tmp_path / "DMS_substitutions.csv", index=False)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for seed, name in enumerate(("one", "two")):
        made[name] = load(save(esm(2, 32, 4, seed=seed), tmp_path_factory.mktemp("models") / name))
    return made


def quiet(_):
    pass


def test_assays_get_a_column_for_each_model_and_a_mean_by_proteins_and_types(folder, models, tmp_path):
    out = tmp_path / "out"
    for model in models.values():
        scores = longlens.score_proteingym(folder, model=model, output=out, progress=quiet)
    rows = []
    for name, (sequence, uniprot, selection, taxon) in ASSAYS.items():
        table, given = pd.read_csv(out / f"{name}.csv"), pd.read_csv(folder / f"{name}.csv")
        assert list(table.columns) == [*given.columns, "one", "two"]
        pd.testing.assert_frame_equal(table[list(given.columns)], given)
        for model in models:
            alone = longlens.score({name: sequence}, list(given["mutant"]), model=models[model]).scores
            np.testing.assert_allclose(table[model], alone, atol=2e-6)
            rows.append({"DMS_id": name, "UniProt_ID": uniprot, "coarse_selection_type": selection, "taxon": taxon,
                         "model": model, "spearman": spearmanr(table[model], table["DMS_score"]).statistic,
                         "auc": roc_auc_score(table["DMS_score_bin"], table[model]), "variants": 25})  # fmt: skip
    wanted = pd.DataFrame(rows)
    pd.testing.assert_frame_equal(pd.DataFrame(scores.assays), wanted)
    pd.testing.assert_frame_equal(pd.read_csv(out / "spearman.csv"), wanted, atol=1e-6)
    # ProteinGym's order of means
    for model, part in wanted.groupby("model"):
        by_protein = part.groupby(["coarse_selection_type", "UniProt_ID"])["spearman"].mean()
        assert scores.spearman(model) == pytest.approx(by_protein.groupby("coarse_selection_type").mean().mean())
        # and of a taxon: over its proteins alone
        by_taxon = part.groupby(["UniProt_ID", "taxon"])["spearman"].mean().groupby("taxon").mean()
        found = {row["group"]: row["spearman"] for row in scores.summary
                 if (row["model"], row["kind"]) == (model, "taxon")}  # fmt: skip
        assert found == pytest.approx(by_taxon.to_dict())
    summary = pd.read_csv(out / "summary.csv", keep_default_na=False)
    assert set(zip(summary["kind"], summary["group"], strict=True)) == {
        ("all", ""), ("selection", "Activity"), ("selection", "Stability"), ("taxon", "Human"), ("taxon", "Virus"),
    }  # fmt: skip
    assert pl.DataFrame(scores).shape == (8, 8)
    assert "ProteinGym" in scores._repr_html_()
    with pytest.raises(InputError, match="expected a model of one, two, got 'three'"):
        scores.spearman("three")


def test_the_command_and_an_interruption(folder, models, tmp_path, monkeypatch):
    arguments = ["score", "--proteingym", str(folder), "-m", models["one"].source, "--tokens-per-batch", "100"]

    def run(out):
        return CliRunner().invoke(cli, [*arguments, "-o", str(tmp_path / out)], standalone_mode=False)

    result = run("whole")
    assert result.return_value == 0, result.exception
    assert ", one, 4 assays" in result.stdout
    commit, units = ResultFolder.commit, []

    def stopping(self, unit):
        commit(self, unit)
        units.append((self.path.name, unit))
        if len(units) in (2, 9):
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultFolder, "commit", stopping)
    stops = 0
    while not (tmp_path / "cut" / "summary.csv").exists():
        stops += run("cut").exception is not None
    assert stops == 2
    # no unit is computed twice
    assert len(units) == len(set(units))
    for path in (tmp_path / "whole").glob("*.csv"):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


def test_one_assay_without_a_reference_file(folder, models, tmp_path):
    (folder.parent / "DMS_substitutions.csv").unlink()
    notices = []
    scores = longlens.score_proteingym(
        folder / "C2_X_2024.csv", model=models["one"], output=tmp_path / "out", progress=notices.append
    )
    assert [row["DMS_id"] for row in scores.assays] == ["C2_X_2024"]
    assert scores.spearman("one") == pytest.approx(scores.assays[0]["spearman"])
    assert any("no reference file" in getattr(notice, "text", "") for notice in notices)


def test_variants_that_cannot_be_scored_are_skipped(folder, models, tmp_path):
    path = folder / "C2_X_2024.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "A999P,AAA,0.5,1", *lines[1:]]) + "\n")
    with pytest.raises(SequenceError, match=r"C2_X_2024\.csv, line 2: A999P: expected a position"):
        longlens.score_proteingym(folder, model=models["one"], output=tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(cli, ["score", "--proteingym", str(folder), "-m", models["one"].source, "-o",
                                      str(tmp_path / "out"), "--on-error", "skip"], standalone_mode=False)  # fmt: skip
    assert result.return_value == 3
    rows = list(csv.DictReader((tmp_path / "out" / "C2_X_2024.csv").read_text().splitlines()))
    assert rows[0]["one"] == ""
    assert all(row["one"] for row in rows[1:])


@pytest.mark.parametrize("option", [("--mutation-col", "mutant"), ("--offset-idx", "1")])
def test_options_of_other_tables_are_refused(folder, tmp_path, option):
    result = CliRunner().invoke(
        cli, ["score", "--proteingym", str(folder), "-o", str(tmp_path / "out"), *option], standalone_mode=False
    )
    assert f"expected --proteingym without {option[0]}" in result.exception.format_message()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: (folder / "C2_X_2024.csv").write_text("mutant,score\n"), SequenceError, "a column 'DMS_score'"),
        (lambda folder: (folder / "C2_X_2024.csv").write_text("mutant,DMS_score\nWT,high\n"), SequenceError,
         "line 2: expected a number in DMS_score, got 'high'"),
        (lambda folder: swap(folder), SequenceError, "expected mutated_sequence to be the protein of A4_X_2024 with"),
        (lambda folder: (folder.parent / "DMS_substitutions.csv").write_text("DMS_id\n"), SequenceError,
         "a column 'DMS_filename'"),
        (lambda folder: (folder.parent / "DMS_substitutions.csv").write_text("DMS_id,DMS_filename,target_seq\n"),
         InputError, "expected a row for an assay of"),
        (lambda folder: (folder.parent / "DMS_substitutions.csv").write_text(
            "DMS_id,DMS_filename,target_seq\n../x,C2_X_2024.csv,MKT\n"), SequenceError, "that can name a file"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], InputError, "expected tables of assays"),
        (lambda folder: (folder.parent / "out").write_text("x"), InputError, "to be empty, new or a result"),
    ],
)  # fmt: skip
def test_broken_files_are_named_before_any_work(change, error, message, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("longlens.jobs.proteingym_job.load_model", lambda *_: pytest.fail("the model was loaded"))
    change(folder)
    result = CliRunner().invoke(
        cli, ["score", "--proteingym", str(folder), "-o", str(tmp_path / "out")], standalone_mode=False
    )
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)


def swap(folder):
    """Two variants' sequences change places."""
    table = pd.read_csv(folder / "A4_X_2024.csv")
    table["mutated_sequence"] = table["mutated_sequence"][::-1].to_numpy()
    table.to_csv(folder / "A4_X_2024.csv", index=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--proteingym", "none", "-o", "out"], "found no none"),
        (["--proteingym", "none"], "-o FOLDER"),
        (["--proteingym", "none", "-o", "out", "--all"], "without other variants"),
        (["--all", "--sequence", "MK", "--reference", "r.csv"], "--reference only with --proteingym"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["score", *arguments], standalone_mode=False)
    assert message in str(getattr(result.exception, "message", result.exception))


def test_numbers_of_agreement():
    draw = np.random.default_rng(0)
    for ties in (1, 3):
        x, y = draw.normal(size=60).round(3 // ties), draw.normal(size=60).round(1)
        assert rank_agreement(x, y) == pytest.approx(spearmanr(x, y).statistic)
        assert area_under_curve(x, (y > 0).astype(float)) == pytest.approx(roc_auc_score(y > 0, x))
        # there is one implementation, which also measures what is fine-tuned
        assert rank_agreement(x, y) == metrics.spearman(y, x)(np.ones(60))
    assert ranks(np.array([3.0, 1.0, 3.0])).tolist() == [2.5, 1, 2.5]
    assert rank_agreement(np.array([1.0, np.nan, 2.0, 5.0]), np.array([9.0, 1.0, 4.0, 3.0])) == -1
    assert np.isnan(rank_agreement(np.ones(5), np.arange(5.0)))
    assert np.isnan(area_under_curve(np.arange(3.0), np.ones(3)))


def test_the_error_is_that_of_drawing_proteins():
    assays = [Assay(f"a{number}", None, "", f"u{number}", "one") for number in range(40)]
    values = np.random.default_rng(1).normal(size=40)
    mean, error = mean_and_error(values, assays)
    assert mean == pytest.approx(values.mean())
    # the standard error of a mean, by its formula
    assert error == pytest.approx(values.std() / np.sqrt(40), rel=0.03)
    # one protein tells nothing of others
    assert np.isnan(mean_and_error(values[:1], assays[:1])[1])
    # two assays of one protein vary together
    twice = [Assay(f"a{number}", None, "", f"u{number // 2}", "one") for number in range(40)]
    pairs = values.reshape(20, 2).mean(1)
    assert mean_and_error(values, twice)[1] == pytest.approx(pairs.std() / np.sqrt(20), rel=0.03)
