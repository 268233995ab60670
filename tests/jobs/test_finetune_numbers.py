"""The numbers of a fine-tuning: where thresholds come from, what each rate moves, and losses that are not finite."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import longlens
from esm_peer import esm, save
from longlens.errors import InputError, LonglensWarning
from longlens.finetuning.outcome import Outcome
from longlens.finetuning.saved import choose_threshold, decide
from longlens.finetuning.trainer import TuneSettings
from planted_tasks import composition_file, motif_file

BASELINES = ["majority", "length", "composition", "nearest"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save(esm(2, 32, 4), tmp_path_factory.mktemp("model"))


def tune(file, small, task="sequence_to_class", **settings):
    method = settings.pop("method", "head")
    chosen = TuneSettings(**{"steps": 4, "every": 2, "tokens": 600, "hidden": 4, "rank": 2, **settings})
    return longlens.finetune(file, task=task, method=method, model=small, settings=chosen, progress=lambda event: None)


def strict(data):
    """JSON as the standard has it: without NaN and Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is no number of JSON")

    return json.loads(data, parse_constant=refuse)


@pytest.mark.parametrize("task", ["sequence_to_class", "residue_to_class"])
def test_every_threshold_is_chosen_on_validation_proteins(tmp_path, small, monkeypatch, task):
    """Also those of the baselines: a fixed 0.5 would let a fine-tuned model beat them by its threshold alone."""
    written = []
    write = Outcome.write
    monkeypatch.setattr(Outcome, "write", lambda self, work: written.append(self) or write(self, work))
    if task == "sequence_to_class":
        tuned = tune(composition_file(tmp_path / "c.csv", 60, classes=True), small)
    else:
        tuned = tune(motif_file(tmp_path / "m.fasta", 40), small, task)
    (outcome,) = written
    assert list(tuned.report["thresholds"]) == [*BASELINES, "probe", "head"]
    for name, threshold in tuned.report["thresholds"].items():
        values = {}
        for part in ("validation", "test"):
            numbers = outcome.split.members(part)
            values[part] = [
                np.concatenate(rows) for rows in
                ([outcome.targets.values[n] for n in numbers], [outcome.outputs[name][n] for n in numbers])
            ]  # fmt: skip
        assert threshold == choose_threshold(outcome.targets, *values["validation"]), name
        truth, outputs = values["test"]
        right = (decide(outcome.targets, outputs, threshold) == truth).mean()
        assert tuned.report["test"][name]["accuracy"]["value"] == pytest.approx(right, abs=1e-6)
    assert any(tuned.report["thresholds"][name] != 0.5 for name in BASELINES)


def test_the_head_has_its_own_rate_also_beside_the_adaptation(tmp_path, small):
    file = motif_file(tmp_path / "m.fasta", 40)
    for still, moved in (("rate", "head_rate"), ("head_rate", "rate")):
        tuned = tune(file, small, "residue_to_class", method="lora", **{still: 1e-30, moved: 1e-2})
        first, *later = [loss for _, _, loss in tuned.report["stages"]["lora"]["log"]]
        # one of the two is as good as frozen, and the other changes the loss
        assert all(abs(loss - first) > 1e-5 for loss in later), moved
        changed = longlens.load(tuned.folder / "model").state_dict()
        same = all(torch.equal(value, changed[name]) for name, value in longlens.load(small).state_dict().items())
        assert same == (moved == "head_rate")


@pytest.mark.parametrize("method", ["head", "lora"])
def test_a_loss_that_is_not_finite_is_a_warning_and_the_best_step_before_it_is_kept(tmp_path, small, method):
    file = composition_file(tmp_path / "c.csv", 40)
    settings = TuneSettings(steps=6, every=2, hidden=4, rank=2, **{"head": {"head_rate": 1e30},
                            "lora": {"rate": 1e30, "head_rate": 1e-3}}[method])  # fmt: skip
    with pytest.warns(LonglensWarning, match=rf"^{method}: the loss at step 2 is not a finite number.*--(head-)?rate"):
        tuned = longlens.finetune(
            file, task="sequence_to_value", method=method, model=small, settings=settings, output=tmp_path / "tuned"
        )
    report = strict((tmp_path / "tuned" / "report.json").read_bytes())
    assert report == tuned.report
    stage = report["stages"][method]
    assert stage["best_step"] == 0
    assert math.isfinite(stage["best_loss"])
    assert stage["log"][-1][2] is None
    assert any("is not a finite number" in warning for warning in report["warnings"])
    assert "warning: " + method + ": the loss at step 2" in tuned.text
    # what is kept is the stage before it
    before = {"head": "probe", "lora": "head"}[method]
    measured = report["test"]
    assert measured[method]["rmse"]["value"] == pytest.approx(measured[before]["rmse"]["value"], rel=1e-4)
    predicted = pq.read_table(tmp_path / "tuned" / "predictions.parquet").column("predicted").to_numpy()
    assert np.isfinite(predicted).all()


def test_numbers_that_overflow_are_refused(tmp_path):
    model = esm(2, 32, 4)
    with torch.no_grad():
        model.esm.encoder.layer[1].output.dense.weight.mul_(1e6)
    save(model, tmp_path / "model")

    def tuned(dtype):
        return longlens.finetune(
            composition_file(tmp_path / "c.csv", 40), task="sequence_to_value", method="probe", dtype=dtype,
            model=tmp_path / "model", output=tmp_path / dtype, progress=lambda event: None,
        )  # fmt: skip

    said = "expected finite numbers from the model, got others in the batch from {}.* on, in float16.*use dtype float32"
    with pytest.raises(InputError, match=said.format("p")):
        tuned("float16")
    tuned("float32")
    with pytest.raises(InputError, match=said.format("new")):
        longlens.predict({"new": "MKTAYIAK"}, model=tmp_path / "float32", dtype="float16")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("weight_decay", -0.1, "expected weight_decay of at least 0, got -0.1"),
        ("weight_decay", math.nan, "expected weight_decay of at least 0, got nan"),
        ("weight_decay", math.inf, "expected weight_decay of at least 0, got inf"),
        ("seed", -1, "expected a seed as a whole number from 0 to 4294967295, got -1"),
        ("seed", 2**32, "expected a seed as a whole number from 0 to 4294967295, got 4294967296"),
        ("seed", 1.5, "expected a seed as a whole number from 0 to 4294967295, got 1.5"),
    ],
)
def test_settings_out_of_range(name, value, said):
    with pytest.raises(InputError, match=said):
        TuneSettings(**{name: value})


def test_the_largest_seed_serves(tmp_path, small):
    tune(composition_file(tmp_path / "c.csv", 40), small, "sequence_to_value", seed=2**32 - 1)


def test_a_stage_that_no_longer_improves_stops_and_says_so(tmp_path, small):
    events = []
    tuned = longlens.finetune(
        composition_file(tmp_path / "c.csv", 40), task="sequence_to_value", model=small, progress=events.append,
        settings=TuneSettings(steps=100, every=2, patience=2, hidden=4, head_rate=0.5),
    )  # fmt: skip
    stage = tuned.report["stages"]["head"]
    assert stage["steps"] == stage["best_step"] + 4 < 100
    said = f"head: stopped at step {stage['steps']}, after 2 validations without improvement"
    assert any(said in str(event) for event in events)
