"""What every job has from the runner: refusals, manifests, resuming, interruption, messages of the disk."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

import longlens
from esm_peer import esm, protein, save
from longlens.cli.main import cli
from longlens.errors import InputError, LonglensError
from longlens.io.results import ResultFolder
from longlens.jobs import cores, limits, runner
from longlens.jobs.job_key import machine, model_name
from longlens.jobs.memory import process_bytes
from longlens.jobs.progress import Notice, StageProgress

WILD = "MKTAYIAKQRQISFVKSHFS"
LENGTHS = (30, 5, 40, 12)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save(esm(2, 32, 4), tmp_path_factory.mktemp("runs") / "human" / "model")


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "proteins.fasta"
    path.write_text("".join(f">p{n}\n{protein(n, n)}\n" for n in LENGTHS))
    return path


def run(*arguments, **keywords):
    return CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False, **keywords)


def stop_after(monkeypatch, units, error=KeyboardInterrupt):
    """Have a job stop as soon as so many units are counted."""
    commit, seen = ResultFolder.commit, []

    def counting(self, unit):
        commit(self, unit)
        seen.append(unit)
        if len(seen) == units:
            raise error

    monkeypatch.setattr(ResultFolder, "commit", counting)
    return seen


def test_the_manifest_tells_what_was_run(model_folder, fasta, tmp_path):
    longlens.embed(fasta, model=model_folder, output=tmp_path / "out", threads=1)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["model"]["name"] == "human"
    assert manifest["model"]["source"] == str(model_folder)
    assert len(manifest["model"]["sha256"]) == 64
    assert manifest["proteins"] == {"ids": [f"p{n}" for n in LENGTHS], "lengths": list(LENGTHS)}
    (made,) = manifest["runs"]
    assert made["machine"]["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert made["threads"] == 1
    assert set(made["versions"]) == {"longlens", "torch"}
    assert made["started"] <= made["finished"]
    assert made["started"].endswith("+00:00")
    assert Path(sys.argv[0]).parent.name in made["command"]


@pytest.mark.parametrize(("source", "name"), [
    ("facebook/esm2_t6_8M_UR50D", "esm2_t6_8M_UR50D"), ("tiny", "tiny"), ("/runs/human/model", "human"),
    ("esm2_t6_8M_UR50D.pt", "esm2_t6_8M_UR50D"), ("/runs/human", "human"),
    ("/cache/models--facebook--esm2_t6/snapshots/08e4846e537177426273712802403f7ba8261b6c", "esm2_t6"),
])  # fmt: skip
def test_a_model_is_named_by_what_tells_it_from_others(source, name):
    assert model_name(source) == name


def test_every_format_names_the_model_and_has_the_ids(model_folder, fasta, tmp_path):
    import h5py
    import numpy as np
    import pyarrow.parquet as pq
    import zarr

    for kind in ("h5", "zarr", "npz", "parquet", "pt"):
        longlens.embed(fasta, model=model_folder, output=tmp_path / kind, format=kind)
        assert b'"model": "human"' in pq.read_schema(tmp_path / kind / "index.parquet").metadata[b"longlens"]
    ids = [f"p{n}" for n in LENGTHS]
    with h5py.File(tmp_path / "h5" / "arrays.h5") as file:
        assert file.attrs["model"] == "human"
        assert [name.decode() for name in file["about/ids"]] == ids
        assert file["about/lengths"][:].tolist() == list(LENGTHS)
    group = zarr.open_group(tmp_path / "zarr" / "arrays.zarr", mode="r")
    assert (group.attrs["model"], group.attrs["ids"], group.attrs["lengths"]) == ("human", ids, list(LENGTHS))
    with np.load(tmp_path / "npz" / "arrays.npz") as file:
        assert (str(file["about/model"]), file["about/ids"].tolist()) == ("human", ids)
    schema = pq.read_schema(tmp_path / "parquet" / "arrays.parquet")
    assert b'"model": "human"' in schema.metadata[b"longlens"]
    assert torch.load(tmp_path / "pt" / "proteins" / "0000001.pt", weights_only=True)["model"] == "human"
    # what describes the arrays is not listed among them
    assert longlens.embed(fasta, model=model_folder, output=tmp_path / "h5").names == ["mean/2"]


@pytest.mark.parametrize("refused", [
    ["--max-memory", "1K"], ["--layers", "9"], ["--tokens-per-batch", "none"],
])  # fmt: skip
def test_a_refused_command_does_not_block_the_corrected_one(model_folder, fasta, tmp_path, refused):
    out = tmp_path / "out"
    assert isinstance(run("embed", fasta, "-o", out, "-m", model_folder, *refused).exception, InputError)
    assert not out.exists()
    assert run("embed", fasta, "-o", out, "-m", model_folder).return_value == 0


def test_a_budget_that_does_not_fit_does_not_block_the_corrected_command(model_folder, tmp_path):
    path, out = tmp_path / "many.fasta", tmp_path / "out"
    path.write_text("".join(f">p{i}\n{protein(400, i)}\n" for i in range(300)))
    memory = f"{(process_bytes() >> 20) + 250}M"
    large = ["--include", "per-tok", "logits", "--tokens-per-batch", 10**7, "--max-memory", memory]
    refused = run("embed", path, "-o", out, "-m", model_folder, *large)
    assert isinstance(refused.exception, InputError), refused.exception
    assert not out.exists()
    result = run("embed", path, "-o", out, "--tokens-per-batch", 4000, "-m", model_folder)
    assert result.exception is None, result.exception


def test_a_method_without_weights_does_not_block_the_corrected_look(model_folder, fasta, tmp_path):
    out = tmp_path / "out"
    refused = run("look", fasta, "-o", out, "--no-figures", "--method", "linear", "-m", model_folder)
    assert isinstance(refused.exception, LonglensError)
    result = run("look", fasta, "-o", out, "--no-figures", "-m", model_folder)
    assert result.exception is None, result.exception


def test_a_job_that_failed_before_its_first_unit_does_not_block_another(model_folder, fasta, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("longlens.jobs.embed.EmbedJob.compute", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            longlens.embed(fasta, model=model_folder, output=out)
    assert (out / "manifest.json").is_file()
    # other options, in the same folder
    longlens.embed(fasta, model=model_folder, output=out, layers=0)
    with pytest.raises(InputError, match=r"options\.layers: was \[0\], is \[1\]"):
        longlens.embed(fasta, model=model_folder, output=out, layers=1)


def test_a_resume_with_less_memory_is_refused_by_what_it_needs(model_folder, fasta, tmp_path, monkeypatch):
    from longlens.jobs import embed as job

    out = tmp_path / "out"
    stop_after(monkeypatch, 1)
    arguments = {"model": model_folder, "output": out, "include": ["mean", "surprise"]}
    with pytest.raises(KeyboardInterrupt):
        longlens.embed(fasta, **arguments, surprise="masked")
    monkeypatch.undo()
    loaded = longlens.load(model_folder)
    held = job.embedding_outputs(loaded.config, job.EmbedOptions(include=("mean", "surprise")))
    # enough for the longest protein alone, not for the batch that was first_run_choices
    allowed = job.batch_bytes(loaded.config, max(LENGTHS) + 2, 4, held)
    monkeypatch.setattr(job, "memory_limit", lambda *_: allowed)
    needs = "a batch of 2,843 tokens, of 16,384 as chosen: needs about .* with more. Raise --max-memory to continue"
    with pytest.raises(InputError, match=needs):
        longlens.embed(fasta, **arguments, surprise="masked")


def test_contacts_resumed_with_less_memory_are_refused_by_what_they_need(model_folder, fasta, tmp_path, monkeypatch):
    from longlens.jobs import contacts as job

    monkeypatch.setattr(job, "TOKENS", 20)
    stop_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        longlens.contacts(fasta, model=model_folder, output=tmp_path / "out")
    needed = job.needs(longlens.load(model_folder), max(LENGTHS))
    assert needed["kept"] != needed["whole"]
    monkeypatch.setattr(job, "memory_limit", lambda *_: needed["whole"] - 1)
    monkeypatch.setattr(job, "choose_form", lambda *_: "whole")
    with pytest.raises(
        InputError, match=r"40 residues: needs about .* begun with more. Raise --max-memory to continue"
    ):
        longlens.contacts(fasta, model=model_folder, output=tmp_path / "out")


def test_a_rerun_says_where_it_continues_and_that_nothing_is_left(model_folder, fasta, tmp_path, monkeypatch):
    out, events = tmp_path / "out", []
    arguments = {"model": model_folder, "output": out, "tokens_per_batch": 20, "progress": events.append}
    stop_after(monkeypatch, 2)
    with pytest.raises(runner.Interrupted, match=r"2 of 4 units of work are done: run the same command again"):
        longlens.embed(fasta, **arguments)
    monkeypatch.undo()
    del events[:]
    longlens.embed(fasta, **arguments)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert f"{out}: continuing after 2 of 4 units of work" in notices
    steps = [event for event in events if isinstance(event, StageProgress)]
    # the first says what was there already
    assert [step.done for step in steps] == [35, 75, 87]
    assert steps[0] == StageProgress("embed", 35, 87, "residues")
    del events[:]
    longlens.embed(fasta, **arguments)
    assert [event.text for event in events][-1] == f"{out} is complete already: nothing is left to do"


def test_another_kind_of_machine_is_said_and_recorded(model_folder, fasta, tmp_path, monkeypatch):
    stop_after(monkeypatch, 1)
    arguments = {"model": model_folder, "output": tmp_path / "out", "tokens_per_batch": 20}
    with pytest.raises(KeyboardInterrupt):
        longlens.embed(fasta, **arguments)
    monkeypatch.undo()
    other, events = {**machine(), "cpu": "AVX1024"}, []
    monkeypatch.setattr(runner, "machine", lambda: other)
    monkeypatch.setattr("longlens.jobs.job_key.machine", lambda: other)
    longlens.embed(fasta, **arguments, progress=events.append)
    (warning,) = [event.text for event in events if isinstance(event, Notice) and event.warning]
    assert "AVX1024" in warning
    runs = json.loads((tmp_path / "out" / "manifest.json").read_text())["runs"]
    assert [entry["machine"]["cpu"] for entry in runs] == [machine()["cpu"], "AVX1024"]
    assert [entry["first_unit"] for entry in runs] == [0, 1]


@pytest.mark.parametrize(("number", "advice"), [
    (errno.ENOSPC, "free some space"), (errno.EROFS, "give a folder that you may write to"),
    (errno.EACCES, "give a folder that you may write to"), (errno.EIO, "mend this"),
])  # fmt: skip
def test_what_the_disk_says_is_not_always_that_it_is_full(model_folder, fasta, tmp_path, monkeypatch, number, advice):
    import os

    def failing(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("longlens.io.row_array.RowArray.write", failing)
    with pytest.raises(InputError, match=advice) as refused:
        longlens.embed(fasta, model=model_folder, output=tmp_path / "out")
    assert ("free some space" in str(refused.value)) == (number == errno.ENOSPC)


def test_ctrl_c_says_that_the_command_can_be_run_again(model_folder, tmp_path):
    path = tmp_path / "many.fasta"
    path.write_text("".join(f">p{n}\n{protein(60, n)}\n" for n in range(60)))
    call = [sys.executable, "-m", "longlens", "embed", path, "-o", tmp_path / "out", "-m", model_folder, "--include",
            "surprise", "--surprise", "masked", "--tokens-per-batch", "62"]  # fmt: skip
    # tests that a shell runs in the background are told to ignore it, and so would the command be
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job = subprocess.Popen([str(part) for part in call], stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    journal = tmp_path / "out" / ".work" / "journal.jsonl"
    while job.poll() is None and not (journal.is_file() and journal.read_bytes()):
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 130
    assert "run the same command again to continue" in said
    assert "Traceback" not in said


def test_threads_are_set_for_the_job_alone(model_folder, fasta, tmp_path, monkeypatch):
    seen, before = [], torch.get_num_threads()
    genuine = runner._work
    monkeypatch.setattr(runner, "_work", lambda *a: (seen.append(torch.get_num_threads()), genuine(*a)))
    result = run("embed", fasta, "-o", tmp_path / "out", "-m", model_folder, "--threads", 2)
    assert (result.return_value, seen) == (0, [2])
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="at least 1 thread"):
        longlens.embed(fasta, model=model_folder, threads=0)


def test_without_a_number_all_usable_cores_are_taken(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(limits, "usable_cores", lambda: 7)
    assert limits.default_threads() == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert limits.default_threads() == 3


def test_cores_are_those_of_the_affinity_and_the_control_group(monkeypatch, tmp_path):
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(cores, "QUOTA", quota)
    assert cores.usable_cores() == 8
    quota.write_text("max 100000\n")
    assert cores.usable_cores() == 8
    quota.write_text("250000 100000\n")
    assert cores.usable_cores() == 2


@pytest.fixture
def pair(tmp_path):
    """Two proteins, of 20 and 7 residues."""
    path = tmp_path / "pair.fasta"
    path.write_text(f">a\n{protein(20, 0)}\n>b\n{protein(7, 1)}\n")
    return path


@pytest.fixture
def variants(tmp_path):
    path = tmp_path / "v.csv"
    path.write_text("mutant\nM1A\n")
    return path


def test_every_job_tells_what_was_run(model_folder, pair, variants, tmp_path):
    longlens.contacts(pair, model=model_folder, output=tmp_path / "contacts")
    longlens.look(pair, model=model_folder, output=tmp_path / "look", figures=False)
    longlens.score({"a": WILD}, variants, model=model_folder, output=tmp_path / "s.csv")
    for manifest in ("contacts/manifest.json", "look/manifest.json", "s.csv.manifest.json"):
        told = json.loads((tmp_path / manifest).read_text())
        assert (told["model"]["name"], told["model"]["source"]) == ("human", str(model_folder))
        assert told["proteins"]["ids"] == (["a"] if "csv" in manifest else ["a", "b"])
        assert told["proteins"]["lengths"] == ([20] if "csv" in manifest else [20, 7])
        (made,) = told["runs"]
        assert made["command"]
        assert made["machine"]["cpu"] == torch.backends.cpu.get_cpu_capability()
        assert set(made["versions"]) == {"longlens", "torch"}
        assert made["started"] <= made["finished"]


@pytest.mark.parametrize("kind", ["parquet", "npz", "zarr"])
def test_every_contact_map_names_its_model_and_protein(model_folder, pair, tmp_path, kind):
    import zarr

    longlens.contacts(pair, model=model_folder, output=tmp_path / "out", format=kind)
    (path,) = (tmp_path / "out").glob(f"*1.{kind}")
    if kind == "parquet":
        about = json.loads(pq.read_schema(path).metadata[b"longlens"])
    elif kind == "npz":
        with np.load(path) as file:
            about = {name.removeprefix("about/"): str(file[name]) for name in file.files if name.startswith("about/")}
    else:
        about = dict(zarr.open(path, mode="r").attrs)
    assert (about["model"], about["id"], int(about["length"])) == ("human", "a", 20)
    assert about["longlens_version"] == longlens.__version__


def test_tables_of_a_look_name_the_model(model_folder, pair, tmp_path):
    longlens.look(pair, model=model_folder, output=tmp_path / "look", figures=False)
    tables = sorted((tmp_path / "look").glob("*/*.parquet"))
    assert tables
    for path in tables:
        assert b'"model": "human"' in (pq.read_schema(path).metadata or {}).get(b"longlens", b""), path.name
