"""Predictions of a fine-tuned model: as files, by the weights that were fine-tuned and no others, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import longlens
from esm_peer import esm, save
from longlens.cli.main import cli
from longlens.errors import CheckpointError
from longlens.finetuning.saved import ENTRY, FILE, load_head, save_head
from longlens.finetuning.trainer import TuneSettings
from longlens.jobs.base_model import weights_sha256
from longlens.models.pretrained import DTYPES
from planted_tasks import composition_file
from refused_commands import refused

PROTEINS = {"a": "MKTAYIAK", "b": "GAVLIW"}


def tune(folder, model, method="probe", **more):
    """A fine-tuning of few steps."""
    return longlens.finetune(
        composition_file(folder / "c.csv", 40), task="sequence_to_value", model=model, method=method,
        output=folder / "tuned", settings=TuneSettings(steps=2, every=2, hidden=4, rank=2),
        progress=lambda event: None, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save(esm(2, 32, 4), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of the same shape."""
    return save(esm(2, 32, 4, seed=1), tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, small):
    folder = tmp_path_factory.mktemp("task")
    tune(folder, small)
    return folder / "tuned"


def test_predictions_as_files(tmp_path, tuned):
    frames = []
    for suffix in ("csv", "tsv", "parquet"):
        output = tmp_path / f"p.{suffix}"
        predictions = longlens.predict(PROTEINS, model=tuned, output=output)
        assert output.read_bytes() == predictions.data
        assert (tmp_path / f"p.{suffix}.manifest.json").exists()
        frames.append(predictions.to_frame())
        assert frames[-1].equals(frames[0])
    assert list(frames[0].columns) == ["id", "predicted"]
    (tmp_path / "f.fasta").write_text(">a\nMKTAYIAK\n>b\nGAVLIW\n")
    run = CliRunner().invoke(cli, ["predict", str(tmp_path / "f.fasta"), "--model", str(tuned)])
    assert run.exit_code == 0
    assert run.stdout == (tmp_path / "p.csv").read_text()


def test_the_threshold_of_the_rarer_class_is_said(tmp_path, small):
    path = composition_file(tmp_path / "c.csv", 40, classes=True)
    tuned = longlens.finetune(
        path, task="sequence_to_class", model=small, method="probe", output=tmp_path / "tuned",
        progress=lambda event: None,
    )  # fmt: skip
    looked_for, threshold = tuned.report["classes"][1], tuned.report["thresholds"]["probe"]
    said = f"{looked_for}, the rarer class (pr_auc is its), predicted where its probability is {threshold:.3f} or more"
    assert said in tuned.text
    (tmp_path / "f.fasta").write_text(">a\nMKTAYIAK\n")
    run = CliRunner().invoke(cli, ["predict", str(tmp_path / "f.fasta"), "--model", str(tmp_path / "tuned")])
    assert f"predicted is {looked_for} where its probability is {threshold:.3f} or more" in run.stderr


def test_a_base_that_was_moved_is_named(tuned, small):
    before = longlens.predict(PROTEINS, model=tuned)
    moved = small.with_name("moved")
    small.rename(moved)
    try:
        with pytest.raises(CheckpointError, match=r"which cannot be loaded .*say where the model is now with --base"):
            longlens.predict(PROTEINS, model=tuned)
        assert longlens.predict(PROTEINS, model=tuned, base=moved)["a"] == before["a"]
    finally:
        moved.rename(small)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_other_weights_are_refused_in_every_dtype(tuned, small, other, dtype):
    assert len(longlens.predict(PROTEINS, model=tuned, dtype=dtype)) == 2
    assert len(longlens.predict(PROTEINS, model=tuned, base=small, dtype=dtype)) == 2
    with pytest.raises(CheckpointError, match="expected the weights that were fine-tuned"):
        longlens.predict(PROTEINS, model=tuned, base=other, dtype=dtype)
    with pytest.raises(CheckpointError, match="expected the weights that were fine-tuned"):
        longlens.predict(PROTEINS, model=tuned, base=longlens.load(other, dtype=dtype))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_weights_that_changed_in_their_place_are_refused(tmp_path, dtype):
    model = save(esm(2, 32, 4), tmp_path / "model")
    tune(tmp_path, model)
    save(esm(2, 32, 4, seed=1), model)
    with pytest.raises(CheckpointError, match="expected the weights that were fine-tuned"):
        longlens.predict(PROTEINS, model=tmp_path / "tuned", dtype=dtype)


def test_a_head_of_a_narrow_dtype_is_compared_in_it(tmp_path, small, other):
    tune(tmp_path, small, dtype="bfloat16")
    folder = tmp_path / "tuned"
    assert list(load_head(folder)[1].base["sha256"]) == ["bfloat16"]
    for dtype in ("bfloat16", "float32"):
        assert len(longlens.predict(PROTEINS, model=folder, dtype=dtype)) == 2
        with pytest.raises(CheckpointError, match="expected the weights that were fine-tuned"):
            longlens.predict(PROTEINS, model=folder, base=other, dtype=dtype)
    # neither of two narrow dtypes holds the other's numbers
    with pytest.raises(CheckpointError, match=r"expected dtype float32 or bfloat16, .* got float16"):
        longlens.predict(PROTEINS, model=folder, dtype="float16")


def test_the_hash_in_a_dtype_is_that_of_the_model_loaded_in_it():
    whole = longlens.load("tiny", dtype="float32")
    hashes = {dtype: weights_sha256(whole, DTYPES[dtype]) for dtype in DTYPES}
    assert len(set(hashes.values())) == 3
    for dtype, expected in hashes.items():
        assert weights_sha256(longlens.load("tiny", dtype=dtype), DTYPES[dtype]) == expected
    with torch.no_grad():
        next(whole.parameters()).view(-1)[0] += 1
    assert all(weights_sha256(whole, DTYPES[dtype]) != expected for dtype, expected in hashes.items())


def test_a_head_of_an_earlier_longlens_is_named(tmp_path, tuned, small):
    head, info = load_head(tuned)
    save_head(head, replace(info, base={"source": str(small), "sha256": "0" * 64}), tmp_path / FILE)
    with pytest.raises(CheckpointError, match="an earlier longlens made this head"):
        longlens.predict(PROTEINS, model=tmp_path)


# ---- bad input


def test_bad_input_of_predict(tmp_path, tuned):
    fasta = tmp_path / "f.fasta"
    fasta.write_text(">a\nMK1\n")
    assert "expected the folder of a finished `longlens finetune`, found no head" in refused(
        "predict", fasta, "--model", tmp_path
    )
    assert "expected amino acids" in refused("predict", fasta, "--model", tuned)
    assert "expected an output of .csv, .tsv, .parquet" in refused(
        "predict", fasta, "--model", tuned, "-o", tmp_path / "p.xlsx"
    )
    assert "Missing option '-m' / '--model'" in refused("predict", fasta)
    fasta.write_text(">a\nMK\n")
    (tmp_path / "head.safetensors").write_bytes(b"no")
    assert "head.safetensors cannot be read" in refused("predict", fasta, "--model", tmp_path)


@pytest.mark.parametrize("fault", ["entry", "classes", "hidden", "tensors", "width"])
def test_a_head_that_does_not_fit_its_description_is_refused(tmp_path, tuned, fault):
    fasta, path = tmp_path / "f.fasta", tmp_path / FILE
    fasta.write_text(">a\nMK\n")
    with safe_open(tuned / FILE, "pt") as file:
        entries = json.loads(file.metadata()[ENTRY])
    tensors = load_file(tuned / FILE)
    if fault in ("entry", "classes"):
        del entries[{"entry": "task"}.get(fault, fault)]
    elif fault == "hidden":
        entries["hidden"] += 1
    elif fault == "tensors":
        del tensors["query"]
    else:
        tensors["linear.weight"] = tensors["linear.weight"][:, 1:].contiguous()
    save_file(tensors, path, metadata={ENTRY: json.dumps(entries)})
    said = refused("predict", fasta, "--model", tmp_path, "-o", tmp_path / "p.csv")
    assert "expected the folder of a finished `longlens finetune`; the description and the tensors" in said
    assert sorted(found.name for found in tmp_path.iterdir()) == ["f.fasta", FILE]


def test_a_device_that_there_is_not_is_named_and_nothing_else(tmp_path, tuned):
    fasta = tmp_path / "f.fasta"
    fasta.write_text(">a\nMK\n")
    said = refused("predict", fasta, "--model", tuned, "--device", "foo")
    assert said.startswith("expected an available device, such as cpu or cuda, got 'foo'")
    assert "--base" not in said


def test_a_model_of_its_own_takes_no_base(tmp_path, small):
    fasta = tmp_path / "f.fasta"
    fasta.write_text(">a\nMK\n")
    tune(tmp_path, small, "lora")
    assert "holds its own model" in refused("predict", fasta, "--model", tmp_path / "tuned", "--base", small)
