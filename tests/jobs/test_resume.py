"""`score` and `contacts fit`, stopped or killed at any moment, go on to the same bytes; pseudo-ppl reports progress."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

import longlens
from esm_peer import esm, protein, save
from longlens.cli.main import cli
from longlens.errors import InputError
from longlens.io.results import ResultFolder
from longlens.io.structures import ProteinContacts
from longlens.jobs import fit_job
from longlens.jobs.fit_contacts import FitOptions
from longlens.jobs.progress import Notice, StageProgress
from longlens.jobs.runner import Interrupted
from longlens.models.pretrained import load


def standard(length, seed):
    return "".join("A" if residue in "XBUZO" else residue for residue in protein(length, seed))


WILD, OTHER = standard(30, 7), standard(12, 8)
CASES = ["masked-marginals", "wt-marginals", "pseudo-ppl", "all"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save(esm(2, 32, 4), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_folder):
    return load(model_folder)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "v.csv"
    rows = [f"a,{WILD[i]}{i + 1}{'W' if WILD[i] != 'W' else 'A'}" for i in (0, 5, 9, 29)]
    # the second protein's variants stand between those of the first
    rows.insert(1, f"b,{OTHER[3]}4{'W' if OTHER[3] != 'W' else 'A'}")
    path.write_text("id,mutant\n" + "".join(f"{row}\n" for row in rows))
    return path


def score(case, table, model, **keywords):
    if case == "all":
        return longlens.score({"a": WILD}, model=model, tokens_per_batch=64, **keywords)
    proteins = {"b": OTHER, "a": WILD}
    return longlens.score(
        proteins, table, protein_col="id", model=model, scoring_strategy=case, tokens_per_batch=64, **keywords
    )


@pytest.mark.parametrize("case", CASES)
def test_scores_that_were_stopped_go_on_to_the_same_bytes(case, table, model, tmp_path, monkeypatch):
    whole = score(case, table, model, output=tmp_path / "whole.csv")
    commit, left, units = ResultFolder.commit, [1], []

    def stopping(self, unit):
        commit(self, unit)
        units.append(unit)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultFolder, "commit", stopping)
    stops, out, events = 0, tmp_path / "cut.csv", []
    while not out.exists():
        left[0] = 2
        try:
            score(case, table, model, output=out, progress=events.append)
        except Interrupted:
            stops += 1
    # no unit is done twice
    assert units == list(range(len(units)))
    assert stops >= (1 if case != "wt-marginals" else 0) or len(units) < 2
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes() == whole.text.encode()
    assert {path.name for path in tmp_path.iterdir()} == {
        "v.csv", "cut.csv", "whole.csv", "cut.csv.manifest.json", "whole.csv.manifest.json",
    }  # fmt: skip
    manifests = [json.loads((tmp_path / f"{name}.csv.manifest.json").read_text()) for name in ("cut", "whole")]
    assert len(manifests[0].pop("runs")) == stops + 1
    assert len(manifests[1].pop("runs")) == 1
    assert [list(manifest.pop("files")) for manifest in manifests] == [["cut.csv"], ["whole.csv"]]
    assert manifests[0] == manifests[1]
    steps = [event for event in events if isinstance(event, StageProgress)]
    assert steps[-1].done == steps[-1].total
    assert {step.unit for step in steps} == {"positions"}


def test_pseudo_ppl_reports_progress_within_a_variant(model):
    events = []
    longlens.score(WILD, [f"{WILD[0]}1{WILD[0]}"], model=model, scoring_strategy="pseudo-ppl", tokens_per_batch=100,
                   progress=events.append)  # fmt: skip
    assert [event.done for event in events if isinstance(event, StageProgress)] == [*range(3, 30, 3), 30]


def test_another_job_beside_an_unfinished_one_is_refused(table, model, tmp_path, monkeypatch):
    commit = ResultFolder.commit

    def stopping(self, unit):
        commit(self, unit)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResultFolder, "commit", stopping)
    with pytest.raises(Interrupted):
        score("pseudo-ppl", table, model, output=tmp_path / "s.csv")
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"options\.strategy: was pseudo-ppl, is masked-marginals"):
        score("masked-marginals", table, model, output=tmp_path / "s.csv")


def test_killed_before_or_after_the_file_is_in_its_place(table, model, tmp_path, monkeypatch):
    out, work = tmp_path / "s.csv", tmp_path / ".s.csv.longlens"
    for name in ("replace", "rmtree"):
        with monkeypatch.context() as patch:
            if name == "replace":
                patch.setattr("longlens.jobs.single_file.write_whole", lambda *_: 1 / 0)
            else:
                patch.setattr("longlens.jobs.single_file.rmtree", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                score("masked-marginals", table, model, output=out)
        assert work.exists()
        assert out.exists() == (name == "rmtree")
        events = []
        again = score("masked-marginals", table, model, output=out, progress=events.append)
        assert out.read_text() == again.text
        assert not work.exists()
        # in the first case the work was done and is not done again
        assert any(isinstance(event, StageProgress) for event in events) == (name == "rmtree")
        out.unlink()


def test_scores_of_a_killed_process_go_on_to_the_same_bytes(model_folder, tmp_path):
    path = tmp_path / "v.csv"
    text = standard(90, 3)
    rows = [f"{residue}{i + 1}{'W' if residue != 'W' else 'A'}" for i, residue in enumerate(text)]
    path.write_text("mutant\n" + "".join(f"{row}\n" for row in rows))
    call = [sys.executable, "-m", "longlens", "score", str(path), "--sequence", text, "-m", str(model_folder),
            "--tokens-per-batch", "92"]  # fmt: skip
    subprocess.run([*call, "-o", str(tmp_path / "whole.csv")], check=True, capture_output=True)
    draw, killed = random.Random(0), 0
    journal = tmp_path / ".out.csv.longlens" / ".work" / "journal.jsonl"
    for _ in range(2):
        job = subprocess.Popen([*call, "-o", str(tmp_path / "out.csv")], stderr=subprocess.DEVNULL)
        before = len(journal.read_bytes()) if journal.is_file() else 0
        while job.poll() is None and (len(journal.read_bytes()) if journal.is_file() else 0) <= before:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        if job.poll() is None:
            job.send_signal(signal.SIGKILL)
            killed += 1
        job.wait()
    assert killed
    subprocess.run([*call, "-o", str(tmp_path / "out.csv")], check=True, capture_output=True)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_fit_that_was_stopped_goes_on_to_the_same_head(model, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    generator = np.random.default_rng(0)
    examples = []
    for number in range(4):
        matrix = model.predict_contacts([protein(40, number)])[0].numpy()
        i, j = np.triu_indices(40, 6)
        best = np.argsort(-matrix[i, j] + 1e-9 * generator.random(len(i)))[:30]
        examples.append(ProteinContacts(f"p{number}", protein(40, number), np.stack([i[best], j[best]], 1)))
    monkeypatch.setattr(fit_job, "read_examples", lambda *_: examples)
    options = FitOptions(strength=10.0, negatives=200)

    def fit(name, **keywords):
        return fit_job.fit_contacts([], output=tmp_path / name, model=model, options=options, **keywords)

    whole = fit("whole.safetensors")
    commit, genuine, computed = ResultFolder.commit, fit_job.pair_features, []

    def counting(*arguments):
        computed.append(arguments[1])
        return genuine(*arguments)

    def stopping(self, unit):
        commit(self, unit)
        if unit == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit_job, "pair_features", counting)
    monkeypatch.setattr(ResultFolder, "commit", stopping)
    with pytest.raises(Interrupted, match="2 of 4 units"):
        fit("cut.safetensors")
    monkeypatch.setattr(ResultFolder, "commit", commit)
    events = []
    again = fit("cut.safetensors", progress=events.append)
    assert computed == [example.sequence for example in examples]
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert again.fitted.precision == whole.fitted.precision
    assert any(isinstance(event, Notice) and "continuing after 2 of 4" in event.text for event in events)


def test_a_head_cannot_replace_a_folder(model_folder, tmp_path):
    (tmp_path / "c.csv").write_text("id,i,j\n")
    (tmp_path / "p.fasta").write_text(">a\nMK\n")
    result = CliRunner().invoke(cli, ["contacts", "fit", str(tmp_path / "c.csv"), "--fasta", str(tmp_path / "p.fasta"),
                                      "-o", str(tmp_path), "-m", str(model_folder)], standalone_mode=False)  # fmt: skip
    assert isinstance(result.exception, InputError)
