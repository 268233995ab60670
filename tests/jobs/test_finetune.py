"""Fine-tuning: tasks with a known answer, leaks that are counted, kill -9 and the same bytes, and what is refused."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tf

import longlens
from esm_peer import esm, save
from longlens.errors import InputError, LonglensWarning, SequenceError
from longlens.finetuning.trainer import TuneSettings
from longlens.io.results import ResultFolder
from longlens.jobs.runner import Interrupted
from planted_tasks import composition_file, motif_file, residues
from refused_commands import refused

QUICK = TuneSettings(steps=6, every=2, tokens=300, hidden=8, rank=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save(esm(2, 32, 4), tmp_path_factory.mktemp("model"))


def measures(tuned, name):
    return {predictor: found[name] for predictor, found in tuned.report["test"].items()}


# ---- known answers


@pytest.mark.filterwarnings("ignore::longlens.errors.LonglensWarning")
def test_composition_is_learned_by_the_probe(tmp_path):
    tuned = longlens.finetune(composition_file(tmp_path / "c.csv"), task="sequence_to_value", method="probe")
    found = measures(tuned, "spearman")
    assert found["probe"]["value"] > 0.9
    assert found["composition"]["value"] > 0.95
    for name in ("length", "nearest"):
        assert (found[name]["value"] or 0) < 0.5
    assert found["probe"]["low"] < found["probe"]["value"] < found["probe"]["high"]
    assert found["mean"]["value"] is None
    errors = measures(tuned, "rmse")
    assert errors["probe"]["value"] < 0.4 * errors["mean"]["value"]
    assert tuned.measure("spearman") == found["probe"]["value"]
    tuned = longlens.finetune(
        composition_file(tmp_path / "d.csv", classes=True), task="sequence_to_class", settings=TuneSettings(steps=40)
    )
    assert tuned.measure("mcc") > 0.6
    assert tuned.measure("pr_auc") > 0.9
    assert tuned.report["stages"]["head"]["best_loss"] <= tuned.report["stages"]["head"]["first_loss"]
    assert 0 < tuned.report["thresholds"]["head"] < 1
    # what was learned holds for proteins that nobody has seen
    predictions = tuned.predict({"charged": "KEKEKKEEKEAGKEKEKK" * 2, "not": "AGAVLIPFGAVLNQSTGW" * 2})
    assert (predictions["charged"], predictions["not"]) == ("yes", "no")


@pytest.mark.filterwarnings("ignore::longlens.errors.LonglensWarning")
def test_a_motif_is_learned_by_low_rank_adaptation_and_by_nothing_less(tmp_path):
    settings = TuneSettings(steps=60, every=15, tokens=600, rate=4e-3)
    before = longlens.load("tiny").state_dict()
    tuned = longlens.finetune(
        motif_file(tmp_path / "m.fasta"), task="residue_to_class", method="lora", settings=settings,
        output=tmp_path / "tuned",
    )  # fmt: skip
    found = measures(tuned, "mcc")
    # benchmarks/finetuning.py: 0.90 to 0.92 for three seeds
    assert found["lora"]["value"] > 0.8
    for name in ("majority", "length", "composition", "probe"):
        assert found[name]["high"] < found["lora"]["low"], name
    assert found["nearest"]["value"] < found["lora"]["low"]
    # the folder holds a model like any other, for longlens and for transformers
    model = longlens.load(tmp_path / "tuned" / "model")
    peer = tf.EsmForMaskedLM.from_pretrained(tmp_path / "tuned" / "model").eval()
    packed = model.pack("MKTAYHEKAAHKE")
    with torch.no_grad():
        theirs = peer.esm(packed.tokens[None]).last_hidden_state[0]
        ours = model(packed).last
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"encoder.layers.{i}.{part}.weight" for i in range(5) for part in ("qkv", "out")}
    embedded = longlens.embed({"a": "MKTAYHEKAAHKE"}, model=tmp_path / "tuned" / "model")
    np.testing.assert_allclose(embedded["a"], theirs[1:-1].mean(0), rtol=1e-4, atol=1e-4)
    # the predictions for held-out proteins are those that `predict` gives
    table = pq.read_table(tmp_path / "tuned" / "predictions.parquet").to_pylist()
    first = [row for row in table if row["id"] == table[0]["id"]]
    sequences = dict(line.split("\n")[:2] for line in (tmp_path / "m.fasta").read_text().split(">")[1:])
    sequence = next(text for header, text in sequences.items() if header.split()[0] == first[0]["id"])
    again = tuned.predict({"x": sequence}).columns()
    np.testing.assert_allclose(again["p_M"], [row["p_M"] for row in first], atol=1e-5)


# ---- leaks


@pytest.mark.filterwarnings("ignore::longlens.errors.LonglensWarning")
def test_a_leaking_split_warns_with_the_count(tmp_path, small):
    draw = random.Random(0)
    lines = ["id,sequence,target,set"]
    for number in range(24):
        sequence = "".join(residues(40, draw))
        lines.append(f"a{number},{sequence},{number % 7},{'train' if number < 16 else 'validation'}")
        if number < 7:
            # one residue differs
            lines.append(f"b{number},{sequence[:20]}W{sequence[21:]},{number % 7},test")
    lines += [f"c{number},{''.join(residues(40, draw))},{number},test" for number in range(4)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.warns(LonglensWarning, match="7 of 11 test proteins are 30% or more identical .* 7 of them 90%"):
        tuned = longlens.finetune(path, task="sequence_to_value", method="probe", model=small)
    histogram = tuned.report["nearest_training_identity"]["test"]
    assert (histogram["counts"], histogram["alike"]) == ([4, 0, 0, 0, 7], 7)
    assert "7 of 11 test proteins" in tuned.text
    with pytest.warns(LonglensWarning, match="the split is random"):
        longlens.finetune(path, task="sequence_to_value", method="probe", model=small, split="random")
    clusters = tmp_path / "clusters.tsv"
    names = [line.split(",")[0] for line in lines[1:]]
    clusters.write_text("".join(f"{name.replace('b', 'a')}\t{name}\n" for name in names))
    tuned = longlens.finetune(
        path, task="sequence_to_value", method="probe", model=small, split="clusters", clusters=clusters
    )
    assert tuned.report["split"]["clusters"] == 28
    assert tuned.warnings == []


# ---- interruptions


def tune(path, output, small, **more):
    return longlens.finetune(
        path, task="residue_to_class", method="lora", model=small, output=output,
        settings=QUICK, progress=lambda event: None, **more,
    )  # fmt: skip


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small):
    folder = tmp_path_factory.mktemp("whole")
    path = motif_file(folder / "m.fasta", 40)
    tune(path, folder / "out", small)
    return path, contents(folder / "out")


def test_stopped_after_every_unit_it_goes_on_to_the_same_bytes(whole, small, tmp_path, monkeypatch):
    path, expected = whole
    commit = ResultFolder.commit

    def stopping(self, unit):
        commit(self, unit)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResultFolder, "commit", stopping)
    stops = 0
    for _ in range(30):
        try:
            tune(path, tmp_path / "out", small)
            break
        except Interrupted:
            stops += 1
    # comparison, vectors, probe, three rounds of the head and three of the adaptation
    assert stops == 9
    assert contents(tmp_path / "out") == expected
    assert set(expected) == {
        "head.safetensors", "model/config.json", "model/model.safetensors", "predictions.parquet",
        "report.json", "report.txt",
    }  # fmt: skip


def test_killed_while_it_trains_it_goes_on_to_the_same_bytes(whole, small, tmp_path):
    path, expected = whole
    output = tmp_path / "out"
    settings = ["--steps", "6", "--every", "2", "--tokens", "300", "--hidden", "8", "--rank", "2"]
    command = [
        sys.executable, "-m", "longlens", "finetune", str(path), "-o", str(output), "--task", "residue_to_class",
        "--method", "lora", "--model", str(small), "--threads", str(torch.get_num_threads()), *settings,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, started = output / ".work" / "journal.jsonl", time.monotonic()
    while time.monotonic() - started < 120 and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 4:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "report.json").exists()
    tune(path, output, small)
    assert contents(output) == expected
    assert len(json.loads((output / "manifest.json").read_text())["runs"]) == 2


# ---- bad input


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (">a TARGET=x\nMKTA\n>b\nMKT\n", [], "line 3 (b): expected a target, got none"),
        (">a TARGET=x\nMKTA\n", [], "expected at least 2 classes"),
        (">a TARGET=x\nMKTA\n", ["--task", "residue_to_class"], "line 1 (a): expected 4 targets"),
        (">a TARGET=x\nMKTA\n", ["--task", "sequence_to_value"], "line 1 (a): expected a number as target, got 'x'"),
        (
            "".join(f">{i} TARGET={'xy'[i % 2]} SET=train\nMKTA\n" for i in range(9)),
            [],
            "expected proteins of SET=test",
        ),
        ("".join(f">{i} TARGET={'xy'[i % 2]}\nMKTA\n" for i in range(9)), [], "none for validation and test"),
        ("".join(f">{i} TARGET={i % 9 // 4}\nMKTA\n" for i in range(9)), [], "expected each class in at least 3"),
        (">a TARGET=x\nMKTA\n", ["--split", "given"], "expected SET=train and SET=test in the file"),
        (">a TARGET=x\nMKTA\n", ["--labels", "none.fasta"], "a file of labels holds targets of residues"),
        (">a TARGET=x\nMKTA\n", ["--steps", "0"], "expected steps as a whole number of at least 1, got 0"),
        (">a TARGET=x\nMKTA\n", ["--task", "regression"], "'regression' is not one of"),
        (">a TARGET=x\nMKTA\n", ["--method", "full"], "'full' is not one of"),
        ("MKTA\n", [], "expected FASTA, whose first line starts with '>'"),
    ],
)
def test_bad_input_of_finetune(tmp_path, text, options, said):
    path = tmp_path / "f.fasta"
    path.write_text(text)
    command = ["finetune", path, "-o", tmp_path / "out", *(["--task", "sequence_to_class"] if "--task" not in options
               else []), *options]  # fmt: skip
    assert said in refused(*command).replace("\n", " ")
    assert not (tmp_path / "out" / "report.json").exists()


def test_what_else_finetune_refuses(tmp_path, small, monkeypatch):
    assert "expected a FASTA file, found no file of this name" in refused(
        "finetune", tmp_path / "no.fasta", "-o", tmp_path / "o", "--task", "sequence_to_class"
    )
    path = composition_file(tmp_path / "c.csv", 30)
    with pytest.raises(SequenceError, match="expected a column 'label', found id, sequence, target"):
        longlens.finetune(path, task="sequence_to_value", target_col="label")
    with pytest.raises(InputError, match="are allowed"):
        longlens.finetune(path, task="sequence_to_value", method="lora", model=small, max_memory="1M")
    monkeypatch.setattr("longlens.jobs.fit_contacts.find_spec", lambda name: None)
    with pytest.raises(InputError, match="scikit-learn"):
        longlens.finetune(path, task="sequence_to_value")
