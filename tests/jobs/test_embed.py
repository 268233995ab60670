"""Embedding: the arrays are what the model gives, in every format, and being killed changes no byte."""

from __future__ import annotations

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from click.testing import CliRunner

import longlens
from esm_peer import esm, literal, protein, save
from longlens.cli.embed import embed as command
from longlens.errors import InputError, SequenceError
from longlens.jobs.memory import process_bytes
from longlens.models.pretrained import load

LENGTHS = (5, 1, 30, 64, 2, 17, 90, 3)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save(esm(2, 32, 4), tmp_path_factory.mktemp("model"))


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(f">same/../id n={n}\n{protein(n, n)}\n" for n in LENGTHS))
    return path


def run(*arguments, **keywords):
    return CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False,
                              **keywords)  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    """What must be the same after every run: all files, and of the manifest all but the record of the runs."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["runs"]
    names = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names} | {"manifest": manifest}


def expected(model_folder):
    """Each protein alone, by the literal implementation."""
    from transformers import EsmForMaskedLM

    theirs, ours = EsmForMaskedLM.from_pretrained(model_folder).eval(), load(model_folder)
    for n in LENGTHS:
        tokens = ours.pack([protein(n, n)]).tokens
        yield tokens, *literal(theirs, tokens)


def test_arrays_are_the_literal_ones(model_folder, fasta, tmp_path):
    out = tmp_path / "out"
    result = run(fasta, "-o", out, "--model", model_folder, "--include", "mean", "per_tok", "bos", "logits", "surprise",
                 "--repr_layers", 0, 1, -1, "--toks_per_batch", 70)  # fmt: skip
    assert result.return_value == 0
    table = pq.read_table(out / "index.parquet").to_pylist()
    assert [row["length"] for row in table] == list(LENGTHS)
    assert {row["id"] for row in table} == {"same/../id"}
    with h5py.File(out / "arrays.h5") as arrays:
        for row, (tokens, states, logits) in zip(table, expected(model_folder), strict=True):
            residues = slice(row["start"], row["stop"])
            for layer in (0, 1, 2):
                close(arrays[f"per_tok/{layer}"][residues], states[layer][1:-1])
                close(arrays[f"mean/{layer}"][row["row"]], states[layer][1:-1].mean(0))
                close(arrays[f"bos/{layer}"][row["row"]], states[layer][0])
            close(arrays["logits"][residues], logits[1:-1])
            log_p = torch.log_softmax(logits[1:-1].double(), -1)
            truth = log_p.gather(1, tokens[1:-1, None])
            error, entropy = -truth.squeeze(1), -(log_p.exp() * log_p).sum(1)
            close(arrays["surprise"][residues], error)
            close(arrays["entropy"][residues], entropy)
            close(arrays["excess"][residues], error - entropy)
            assert np.array_equal(arrays["rank"][residues], 1 + (log_p > truth).sum(1))
            assert row["surprise"] == pytest.approx(float(error.mean()), abs=1e-5)
            assert row["perplexity"] == pytest.approx(float(error.mean().exp()), rel=1e-5)


def close(ours, theirs):
    theirs = theirs.numpy()
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1.0, np.abs(theirs).max())


def test_masked_surprise_hides_one_residue_at_a_time(model_folder, fasta, tmp_path):
    from transformers import EsmForMaskedLM

    run(fasta, "-o", tmp_path / "out", "--model", model_folder, "--include", "surprise", "--surprise", "masked",
        "--tokens-per-batch", 200)  # fmt: skip
    theirs, ours = EsmForMaskedLM.from_pretrained(model_folder).eval(), load(model_folder)
    found = h5py.File(tmp_path / "out" / "arrays.h5")["surprise"][:]
    wanted = []
    for n in LENGTHS:
        tokens = ours.pack([protein(n, n)]).tokens
        for place in range(1, n + 1):
            hidden = tokens.clone()
            hidden[place] = 32
            wanted.append(-torch.log_softmax(literal(theirs, hidden)[1][place], -1)[tokens[place]].item())
    assert np.abs(found - np.array(wanted)).max() <= 1e-5
    row = pq.read_table(tmp_path / "out" / "index.parquet").to_pylist()[2]
    pseudo_perplexity = np.exp(np.mean(wanted[6:36]))
    assert row["perplexity"] == pytest.approx(pseudo_perplexity, rel=1e-5)


@pytest.mark.parametrize("format_", ["h5", "zarr", "npz", "parquet", "pt"])
def test_every_format_holds_the_same_numbers_and_the_same_bytes_again(model_folder, fasta, tmp_path, format_):
    arguments = [fasta, "--model", model_folder, "--include", "mean", "per-tok", "surprise", "--format", format_]
    for name in ("one", "two"):
        run(*arguments, "-o", tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    run(fasta, "--model", model_folder, "--include", "mean", "per-tok", "surprise", "-o", tmp_path / "plain")
    table = pq.read_table(tmp_path / "one" / "index.parquet").to_pylist()
    with h5py.File(tmp_path / "plain" / "arrays.h5") as plain:
        for row in table:
            residues = slice(row["start"], row["stop"])
            got = read(tmp_path / "one", format_, row)
            np.testing.assert_array_equal(got["mean"], plain["mean/2"][row["row"]])
            np.testing.assert_array_equal(got["per_tok"], plain["per_tok/2"][residues])
            np.testing.assert_array_equal(got["rank"], plain["rank"][residues])


def read(folder, format_, row):
    number, residues = row["row"], slice(row["start"], row["stop"])
    if format_ == "pt":
        held = torch.load(folder / row["file"] / f"{number + 1:07d}.pt", weights_only=True)
        assert held["label"] == row["id"]
        return {"mean": held["mean_representations"][2], "per_tok": held["representations"][2], "rank": held["rank"]}
    if format_ == "parquet":
        held = pq.read_table(folder / row["file"]).slice(number, 1).to_pylist()[0]
        return {"mean": held["mean/2"], "per_tok": np.array(held["per_tok/2"]), "rank": held["rank"]}
    arrays = {"h5": lambda p: h5py.File(p), "npz": np.load, "zarr": lambda p: zarr.open_group(p, mode="r")}
    held = arrays[format_](folder / row["file"])
    return {"mean": held["mean/2"][number], "per_tok": held["per_tok/2"][residues], "rank": held["rank"][residues]}


@pytest.mark.parametrize("surprise", ["wt", "masked"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(model_folder, tmp_path, surprise):
    path = tmp_path / "proteins.fasta.gz"
    lengths = [random.Random(n).randint(1, 40) for n in range(80 if surprise == "wt" else 15)]
    path.write_bytes(gzip.compress("".join(f">p{i}\n{protein(n, i)}\n" for i, n in enumerate(lengths)).encode()))
    call = [sys.executable, "-m", "longlens", "embed", path, "--model", model_folder, "--include", "mean", "surprise",
            "--surprise", surprise, "--tokens-per-batch", "60"]  # fmt: skip
    call = [str(part) for part in call]
    subprocess.run([*call, "-o", str(tmp_path / "whole")], check=True, capture_output=True)
    draw, killed = random.Random(surprise), 0
    journal = tmp_path / "out" / ".work" / "journal.jsonl"
    for _ in range(3):
        job = subprocess.Popen([*call, "-o", str(tmp_path / "out")], stdout=subprocess.DEVNULL)
        before = len(journal.read_bytes()) if journal.is_file() else 0
        # let some units pass, then strike at a random moment
        while job.poll() is None and (len(journal.read_bytes()) if journal.is_file() else 0) <= before:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        if job.poll() is None:
            job.send_signal(signal.SIGKILL)
            killed += 1
        job.wait()
    assert killed >= 2
    subprocess.run([*call, "-o", str(tmp_path / "out")], check=True, capture_output=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    # and once more, with nothing left to do
    subprocess.run([*call, "-o", str(tmp_path / "out")], check=True, capture_output=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("cut", [b'{"unit": 1', b""])
def test_a_journal_line_that_was_cut_off_does_not_count(model_folder, fasta, tmp_path, cut, monkeypatch):
    from longlens.io.results import ResultFolder

    arguments = [fasta, "-o", tmp_path / "out", "--model", model_folder, "--tokens-per-batch", 40]
    commit, calls = ResultFolder.commit, []

    def stop_after_two(self, unit):
        commit(self, unit)
        calls.append(unit)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultFolder, "commit", stop_after_two)
    with pytest.raises(BaseException):  # noqa: B017
        run(*arguments)
    journal = tmp_path / "out" / ".work" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + cut)
    monkeypatch.setattr(ResultFolder, "commit", lambda self, unit: (calls.append(unit), commit(self, unit))[1])
    run(*arguments)
    assert calls[2] == 2
    run(fasta, "-o", tmp_path / "whole", "--model", model_folder, "--tokens-per-batch", 40)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_full_disk_loses_nothing(model_folder, fasta, tmp_path, monkeypatch):
    import os

    from longlens.io import row_array as flat

    arguments = [fasta, "-o", tmp_path / "out", "--model", model_folder, "--tokens-per-batch", 40]
    pwrite, left = os.pwrite, [3]

    def until_full(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return pwrite(*given)

    monkeypatch.setattr(flat.os, "pwrite", until_full)
    with pytest.raises(InputError, match=r"No space left on device.*run the same command again"):
        run(*arguments)
    monkeypatch.setattr(flat.os, "pwrite", pwrite)
    assert run(*arguments).return_value == 0
    run(fasta, "-o", tmp_path / "whole", "--model", model_folder, "--tokens-per-batch", 40)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_job_in_the_same_folder_is_refused_with_the_difference(model_folder, fasta, tmp_path):
    out = tmp_path / "out"
    run(fasta, "-o", out, "--model", model_folder)
    with pytest.raises(InputError, match=r"options\.layers: was \[2\], is \[0\]"):
        run(fasta, "-o", out, "--model", model_folder, "--layers", 0)
    with pytest.raises(InputError, match=r"model\.dtype: was float32, is bfloat16"):
        run(fasta, "-o", out, "--model", model_folder, "--dtype", "bfloat16")
    fasta.write_text(">a\nMK\n")
    with pytest.raises(InputError, match=r"inputs\[0\]\.sha256: was"):
        run(fasta, "-o", out, "--model", model_folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="to be empty, new or a longlens result"):
        run(fasta, "-o", tmp_path / "other", "--model", model_folder)


def test_the_same_job_spelt_otherwise_is_the_same_job(model_folder, fasta, tmp_path):
    out = tmp_path / "out"
    run(fasta, "-o", out, "--model", model_folder, "--include", "mean", "surprise", "--layers", -1)
    made = files(out)
    again = tmp_path / "." / model_folder
    assert run(fasta, "-o", out, "--model", again, "--include", "surprise", "mean", "--layers", 2).return_value == 0
    assert files(out) == made
    with pytest.raises(InputError, match="tokens_per_batch: was absent, is 999"):
        run(fasta, "-o", out, "--model", model_folder, "--include", "mean", "surprise", "--tokens-per-batch", 999)


def test_two_processes_do_not_share_a_folder(model_folder, fasta, tmp_path, monkeypatch):
    from longlens.io.results import ResultFolder

    arguments = [fasta, "-o", tmp_path / "out", "--model", model_folder, "--tokens-per-batch", 40]
    commit, seen = ResultFolder.commit, []

    def and_meanwhile(self, unit):
        commit(self, unit)
        if not seen:
            seen.append(subprocess.run([sys.executable, "-m", "longlens", "embed", *map(str, arguments)],
                                       capture_output=True, text=True, check=False))  # fmt: skip

    monkeypatch.setattr(ResultFolder, "commit", and_meanwhile)
    assert run(*arguments).return_value == 0
    assert seen[0].returncode == 2
    assert "a folder that no other process uses" in seen[0].stderr


def test_a_journal_that_two_wrote_is_refused(model_folder, fasta, tmp_path):
    from longlens.io.results import ResultFolder

    with closing(ResultFolder(tmp_path / "out", {}, [], {})) as folder:
        (folder.work / "journal.jsonl").write_text('{"unit": 0}\n{"unit": 0}\n')
        with pytest.raises(InputError, match="expected unit 1 in line 2"):
            folder.done()


def test_input_that_changes_under_way_is_noticed(model_folder, fasta, tmp_path, monkeypatch):
    from longlens.jobs import inputs as job

    before, read = fasta.read_text(), job.read_cleaned
    for changed in (before.replace("\nM", "\nW", 1), before[: before.rfind(">")], ">a\nMK\n"):
        fasta.write_text(before)

        def after_the_change(*given, changed=changed, **keywords):
            fasta.write_text(changed)
            return read(*given, **keywords)

        monkeypatch.setattr(job, "read_cleaned", after_the_change)
        out = tmp_path / f"out{len(changed)}"
        with pytest.raises(SequenceError, match="changed since the job began"):
            run(fasta, "-o", out, "--model", model_folder, "--include", "mean", "surprise", "--tokens-per-batch", 40)


def test_killed_at_the_very_first_or_last_moment(model_folder, fasta, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "manifest.json.half").write_text("{")
    run(fasta, "-o", begun, "--model", model_folder)
    whole = files(begun)
    (begun / ".work").mkdir()
    (begun / ".work" / "00.raw").write_bytes(b"x" * 100)
    run(fasta, "-o", begun, "--model", model_folder)
    assert files(begun) == whole


def test_a_complete_folder_that_lost_a_file_says_so(model_folder, fasta, tmp_path):
    run(fasta, "-o", tmp_path / "out", "--model", model_folder)
    (tmp_path / "out" / "arrays.h5").unlink()
    with pytest.raises(InputError, match=r"arrays\.h5 was removed or changed"):
        run(fasta, "-o", tmp_path / "out", "--model", model_folder)


def test_a_method_that_does_not_exist_makes_no_folder(model_folder, fasta, tmp_path):
    with pytest.raises(InputError, match="windo"):
        run(fasta, "-o", tmp_path / "out", "--model", model_folder, "--method", "windo")
    assert not (tmp_path / "out").exists()


def test_memory_bounds_a_budget_that_was_named(model_folder, tmp_path):
    path = tmp_path / "many.fasta"
    path.write_text("".join(f">p{i}\n{protein(400, i)}\n" for i in range(3000)))
    # the limit is that of the whole process, which holds what earlier tests left
    limit = process_bytes() // 2**20 + 650
    with pytest.raises(InputError, match="lower --tokens-per-batch"):
        run(path, "-o", tmp_path / "out", "--model", model_folder, "--tokens-per-batch", 10**7, "--include", "logits",
            "--max-memory", f"{limit}M")  # fmt: skip


def test_a_working_folder_with_a_file_called_surprise(model_folder, fasta, tmp_path, monkeypatch):
    (tmp_path / "surprise").mkdir()
    (tmp_path / "0").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(fasta, "-o", "out", "--model", model_folder, "--include", "mean", "surprise", "--layers", 0,
               2).return_value == 0  # fmt: skip


def test_a_skipped_record_has_no_residues(model_folder, tmp_path):
    from longlens.io.reading import open_results

    (tmp_path / "a.fasta").write_text(">a\nMK\n>b\nM2\n")
    run(tmp_path / "a.fasta", "-o", tmp_path / "out", "--model", model_folder, "--include", "surprise", "--on-error",
        "skip")  # fmt: skip
    results = open_results(tmp_path / "out")
    with pytest.raises(InputError, match="got '2' at position 2"):
        results.residues("surprise", results.table[1])


def test_standard_input(model_folder, fasta, tmp_path):
    for name in ("one", "two"):
        run("-", "-o", tmp_path / name, "--model", model_folder, input=fasta.read_bytes())
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert pq.read_table(tmp_path / "one" / "index.parquet").to_pydict()["source"] == ["standard input"] * len(LENGTHS)


HOSTILE = {
    "empty file": (b"", SequenceError, "found none"),
    "no header": (b"MKTAYIAK", SequenceError, "starts with '>'"),
    "no residues": (b">a\n>b\nMK\n", SequenceError, r"record 1 \(a\): expected at least one residue"),
    "digit": (b">a\nMK\n>b\nM2K\n", SequenceError, r"record 2 \(b\).* got '2' at position 2"),
    "chains": (b">a\nMK:GAV\n", SequenceError, "got ':' at position 3"),
    "CRLF and blank lines": (b"\r\n>a\r\n\r\nMK\r\nT\r\n", 1, 0),
    "one residue": (b">a\nM\n", 1, 0),
    "lower case": (b">a\nmkt\n", 1, 0),
    "J and *": (b">a\nMJK*TJ*\n", 1, 3),
    "duplicate ids": (b">a\nMK\n>a\nMK\n", 2, 0),
    "path-like ids": (b">../../etc/passwd\nMK\n>/root/x\nGA\n", 2, 0),
    "unicode header": (">Größe 蛋白\nMK\n".encode(), 1, 0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input(model_folder, tmp_path, name):
    data, outcome, detail = HOSTILE[name]
    path = tmp_path / "in.fasta"
    path.write_bytes(data)
    before = set(tmp_path.rglob("*"))
    arguments = [path, "-o", tmp_path / "out", "--model", model_folder, "--format", "pt"]
    if isinstance(outcome, type):
        with pytest.raises(outcome, match=detail):
            run(*arguments)
        # refused before any work: no folder was made
        assert set(tmp_path.rglob("*")) == before
        return
    assert run(*arguments).return_value == 0
    table = pq.read_table(tmp_path / "out" / "index.parquet").to_pydict()
    assert len(table["id"]) == outcome
    assert sum(table["substituted"]) == detail
    assert all(
        (tmp_path / "out") in made.parents or made == tmp_path / "out" for made in set(tmp_path.rglob("*")) - before
    )


def test_broken_records_and_files_are_skipped_when_asked(model_folder, tmp_path):
    (tmp_path / "a.fasta").write_text(">a\nMK\n>b\nM2\n>c\nGAV\n")
    whole = gzip.compress("".join(f">p{i}\n{protein(300, i)}\n" for i in range(200)).encode())
    (tmp_path / "b.fasta.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d").mkdir()
    paths = [tmp_path / "a.fasta", tmp_path / "b.fasta.gz", tmp_path / "d"]
    result = run(*paths, "-o", tmp_path / "out", "--model", model_folder, "--on-error", "skip")
    assert result.return_value == 3
    table = pq.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    assert [row["id"] for row in table[:3]] == ["a", "c", "p0"]
    problems = [row["problem"] for row in table if row["problem"]]
    assert len(problems) == 3
    for problem, words in zip(problems, ("got '2' at position 2", "cut off or broken", "got a directory"), strict=True):
        assert words in problem


def test_a_single_line_of_twenty_million_residues_is_refused_before_work_with_what_would_help(model_folder, tmp_path):
    path = tmp_path / "long.fasta"
    with path.open("wb") as file:
        file.write(b">long\n")
        for _ in range(20):
            file.write(b"MKTAYIAKQR" * 100_000)
    with pytest.raises(InputError, match=r"\(long\), 20,000,000 residues: needs about .* GiB .* raise --max-memory"):
        run(path, "-o", tmp_path / "out", "--model", model_folder, "--max-memory", "16G")
    assert not (tmp_path / "out").exists()


def test_the_longest_of_the_twenty_thousand(model_folder, tmp_path):
    path = tmp_path / "long.fasta"
    path.write_text(f">long\n{protein(8081, 0)}\n")
    assert run(path, "-o", tmp_path / "out", "--model", model_folder, "--include", "surprise").return_value == 0
    assert h5py.File(tmp_path / "out" / "arrays.h5")["surprise"].shape == (8081,)


def test_masked_copies_count_for_the_memory(model_folder):
    limit = f"{(process_bytes() >> 20) + 300}M"
    common = {"model": model_folder, "include": ["mean", "surprise"], "tokens_per_batch": 200_000, "max_memory": limit}
    longlens.embed(protein(450, 0), **common)
    with pytest.raises(InputError, match=r"a batch of 200,000 tokens, of 200,000 as chosen: needs about"):
        longlens.embed(protein(450, 0), surprise="masked", **common)
