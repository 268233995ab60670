"""Scores by several models: each model's own, their mean, and an interrupted run that continues to the same bytes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

import longlens
from esm_peer import esm, save
from longlens.cli.main import cli
from longlens.errors import InputError
from longlens.jobs import score_models

TEXT = "MKTAYIAKQRQISFVKSHFSRQLEERLGLI"
VARIANTS = [f"{TEXT[0]}1W", f"{TEXT[9]}10A:{TEXT[14]}15P"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [save(esm(1, 32, 4, seed), root / f"esm1v_{seed}") for seed in (1, 2, 3)]


@pytest.mark.parametrize("strategy", ["masked-marginals", "wt-marginals", "pseudo-ppl"])
def test_the_mean_of_several_models(folders, tmp_path, strategy):
    (tmp_path / "v.csv").write_text("mutant,note\n" + "".join(f"{variant},x\n" for variant in VARIANTS))
    together = longlens.score(
        TEXT, tmp_path / "v.csv", model=folders, scoring_strategy=strategy, output=tmp_path / "out.csv"
    )
    alone = [longlens.score(TEXT, VARIANTS, model=folder, scoring_strategy=strategy).scores for folder in folders]
    np.testing.assert_allclose(together.scores, np.mean(alone, 0), atol=2e-6)
    assert np.std(alone, 0).min() > 1e-3
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert list(rows[0]) == ["mutant", "note", "esm1v_1", "esm1v_2", "esm1v_3", "mean"]
    for place, folder in enumerate(folders):
        np.testing.assert_allclose([float(row[folder.name]) for row in rows], alone[place], atol=2e-6)
    manifest = json.loads((tmp_path / "out.csv.manifest.json").read_text())
    assert [model["name"] for model in manifest["models"]] == ["esm1v_1", "esm1v_2", "esm1v_3"]
    assert together.model == "mean of esm1v_1, esm1v_2, esm1v_3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.csv.manifest.json", "v.csv"]


def test_all_substitutions_by_the_command(folders, tmp_path):
    models = [word for folder in folders for word in ("--model", str(folder))]
    result = CliRunner().invoke(cli, ["score", "--sequence", TEXT, "--all", *models, "-o", str(tmp_path / "all.csv")])
    assert result.exit_code == 0, result.output
    matrices = [longlens.score(TEXT, model=folder).matrix for folder in folders]
    table = np.array([row[2:] for row in csv.reader((tmp_path / "all.csv").read_text().splitlines())][1:], np.float64)
    np.testing.assert_allclose(table, np.mean(matrices, 0), atol=2e-6)
    np.testing.assert_allclose(longlens.score(TEXT, model=folders).matrix, table, atol=2e-6)


def test_an_interrupted_run_continues_with_the_model_that_was_not_done(folders, tmp_path, monkeypatch):
    whole = longlens.score(TEXT, VARIANTS, model=folders, output=tmp_path / "whole.csv")
    done, run = [], score_models.run

    def interrupted(job, path, progress):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path.name)
        run(job, path, progress)

    monkeypatch.setattr(score_models, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        longlens.score(TEXT, VARIANTS, model=folders, output=tmp_path / "part.csv")
    assert not (tmp_path / "part.csv").exists()
    monkeypatch.setattr(score_models, "run", run)
    notices = []
    longlens.score(TEXT, VARIANTS, model=folders, output=tmp_path / "part.csv", progress=notices.append)
    assert sum("complete already" in str(notice) for notice in notices) == 2
    assert (tmp_path / "part.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(whole.scores) == 2


def test_skipped_variants_and_names_that_occur_twice(folders):
    scores = longlens.score(TEXT, [VARIANTS[0], "W99A"], model=[folders[0], folders[0]], on_error="skip")
    assert np.isnan(scores.scores[1])
    assert scores.skipped == 1
    frame = scores.columns()
    assert [*frame][1:4] == ["esm1v_1_1", "esm1v_1_2", "mean"]


def test_what_several_models_cannot_do(folders, tmp_path):
    with pytest.raises(InputError, match="at least one model, got none"):
        longlens.score(TEXT, VARIANTS, model=[])
    with pytest.raises(InputError, match="one model's scores"):
        longlens.score(TEXT, model=folders, figure=True, output=tmp_path / "x.csv")
    (tmp_path / "v.csv").write_text(f"mutant,mean,mean_masked-marginals\n{VARIANTS[0]},1,1\n")
    with pytest.raises(InputError, match="has a column 'mean_masked-marginals' already"):
        longlens.score(TEXT, tmp_path / "v.csv", model=folders)
