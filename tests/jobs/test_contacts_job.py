"""`longlens contacts`: every output holds what the whole map holds; killed, it goes on; memory decides the form."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from click.testing import CliRunner
from scipy import sparse

from esm_peer import esm, protein, save
from longlens.cli.main import cli
from longlens.errors import InputError, SequenceError
from longlens.jobs import contact_writers as writers
from longlens.jobs import contacts as job
from longlens.models.pretrained import load

LENGTHS = (40, 7, 120, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    theirs = esm(2, 64, 4)
    torch.manual_seed(0)
    head = theirs.esm.contact_head.regression
    head.weight.data.normal_(0, 3)
    return save(theirs, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "proteins.fasta"
    path.write_text("".join(f">protein/{n} of length\n{protein(n, n)}\n" for n in LENGTHS))
    return path


@pytest.fixture(scope="module")
def maps(model):
    return [found.numpy() for found in load(model).predict_contacts([protein(n, n) for n in LENGTHS])]


def run(*args):
    return CliRunner().invoke(cli, ["contacts", *map(str, args)], standalone_mode=False)


def make(model, fasta, output, *args):
    result = run(fasta, "-o", output, "--model", model, *args)
    assert result.exception is None, result.exception
    assert result.return_value == 0
    return result.output


def pairs(output, place):
    table = pq.read_table(output / f"{place + 1:07d}.parquet").to_pydict()
    return dict(zip(zip(table["i"], table["j"], strict=True), table["probability"], strict=True))


def expected(found, keep, separation=6):
    return {
        (i + 1, j + 1): found[i, j]
        for i in range(len(found)) for j in range(i + separation, len(found)) if keep(i, j)
    }  # fmt: skip


def check(got, want):
    assert list(got) == list(want)
    np.testing.assert_allclose(list(got.values()), list(want.values()), atol=2e-6)


# bytes that hold the kept form and not the whole map
FORMS = {"whole": job.MAPS, "kept": 0}


@pytest.mark.parametrize("form", FORMS)
def test_a_threshold_a_band_and_the_strongest(model, fasta, maps, tmp_path, form, monkeypatch):
    if form == "kept":
        monkeypatch.setattr(job, "choose_form", lambda *_: "kept")
    threshold = float(np.median(maps[2]))
    make(model, fasta, tmp_path / "above", "--threshold", threshold)
    make(model, fasta, tmp_path / "band", "--band", 9, "--min-separation", 3)
    said = make(model, fasta, tmp_path / "top", "--top", 4)
    for place, found in enumerate(maps):
        # rounding may put a pair on either side of the threshold
        edge = {pair for pair, p in expected(found, lambda i, j: True).items() if abs(p - threshold) < 2e-6}
        got = {pair: p for pair, p in pairs(tmp_path / "above", place).items() if pair not in edge}
        check(
            got, {k: p for k, p in expected(found, lambda i, j, f=found: f[i, j] >= threshold).items() if k not in edge}
        )
        check(pairs(tmp_path / "band", place), expected(found, lambda i, j: j - i <= 9, 3))
        best = pairs(tmp_path / "top", place)
        for i, row in enumerate(found):
            far = [row[j] for j in range(len(row)) if abs(i - j) >= 6]
            own = {pair: p for pair, p in best.items() if pair[0] == i + 1}
            np.testing.assert_allclose(list(own.values()), sorted(far, reverse=True)[:4], atol=2e-6)
            assert all(abs(p - row[j - 1]) < 2e-6 for (_, j), p in own.items())
    table = pq.read_table(tmp_path / "top" / "index.parquet").to_pydict()
    assert table["length"] == list(LENGTHS)
    assert table["form"] == [form] * 4
    assert table["id"][0] == "protein/40"
    assert table["pairs"] == [len(pairs(tmp_path / "top", place)) for place in range(4)]
    assert ("4 in linear memory" if form == "kept" else "4 maps computed whole") in said


@pytest.mark.parametrize("form", FORMS)
def test_whole_maps(model, fasta, maps, tmp_path, form, monkeypatch):
    if form == "kept":
        monkeypatch.setattr(job, "choose_form", lambda *_: "kept")
    monkeypatch.setattr("longlens.lens.contacts.STRETCH", 32)
    monkeypatch.setattr(writers, "CHUNK", 32)
    make(model, fasta, tmp_path / "half", "--format", "zarr")
    make(model, fasta, tmp_path / "single", "--format", "zarr", "--array-dtype", "float32")
    for place, found in enumerate(maps):
        name = f"{place + 1:07d}.zarr"
        half, single = (zarr.open_array(tmp_path / kind / name, mode="r")[:] for kind in ("half", "single"))
        assert (half.dtype, single.dtype) == (np.float16, np.float32)
        np.testing.assert_allclose(single, found, atol=2e-6)
        np.testing.assert_allclose(half, found, atol=1e-3)


def test_npz_is_a_sparse_matrix_for_scipy(model, fasta, maps, tmp_path):
    make(model, fasta, tmp_path / "out", "--format", "npz", "--threshold", 0.0, "--min-separation", 1)
    found = sparse.load_npz(tmp_path / "out" / "0000003.npz")
    assert found.shape == (120, 120)
    np.testing.assert_allclose(found.toarray(), np.triu(maps[2], 1), atol=2e-6)


def test_killed_at_any_unit_it_goes_on_to_the_same_files(model, fasta, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "TOKENS", 50)
    make(model, fasta, tmp_path / "whole", "--top", 3, "--figure")
    write, count = job._write_map, [0]

    def failing(*args):
        count[0] += 1
        if count[0] in (2, 4):
            raise MemoryError
        write(*args)

    monkeypatch.setattr(job, "_write_map", failing)
    output = tmp_path / "cut"
    for _ in range(2):
        result = run(fasta, "-o", output, "--model", model, "--top", 3, "--figure")
        assert isinstance(result.exception, MemoryError)
    make(model, fasta, output, "--top", 3, "--figure")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in output.iterdir())
    assert not [name for name in names if "half" in name or name == ".work"]
    jobs = [json.loads((folder / "manifest.json").read_text()) for folder in (output, tmp_path / "whole")]
    # the memory that was free when each began
    assert all(job.pop("first_run_choices") and job.pop("runs") for job in jobs)
    assert jobs[0] == jobs[1]
    for name in set(names) - {"manifest.json"}:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sum(name.endswith(".png") for name in names) == 4
    # what is done is not done again
    count[0] = 1
    make(model, fasta, output, "--top", 3, "--figure")


def test_the_form_follows_the_memory_allowed(model):
    loaded = load(model)
    needed = job.needs(loaded, 50_000)
    assert needed["kept"] < needed["whole"] / 5
    assert job.choose_form(loaded, 50_000, needed["whole"]) == "whole"
    assert job.choose_form(loaded, 50_000, needed["whole"] - 1) == "kept"


def test_what_fits_in_no_form_is_refused(model, fasta, tmp_path, monkeypatch):
    least = min(job.needs(load(model), max(LENGTHS)).values())
    monkeypatch.setattr(job, "memory_limit", lambda *_: least - 1)
    refused = run(fasta, "-o", tmp_path / "out", "--model", model)
    assert isinstance(refused.exception, InputError)
    assert "120 residues: needs about" in str(refused.exception)
    assert "raise --max-memory" in str(refused.exception)
    assert not (tmp_path / "out").exists()


def test_the_picture_holds_the_largest_of_each_cell(model, maps, monkeypatch):
    monkeypatch.setattr(writers, "CELLS", 25)
    monkeypatch.setattr("longlens.lens.contacts.STRETCH", 32)
    loaded = load(model)
    from longlens.lens.contacts import ContactObserver, WholeMap

    contact_map = WholeMap(120, loaded.contact_regression(), loaded.device)
    loaded(loaded.pack([protein(120, 120)]), observers=[ContactObserver([contact_map])])
    picture = writers.MapPreview(120, 6)
    for rows in contact_map.rows():
        picture.take(rows)
    near = np.abs(np.subtract.outer(np.arange(120), np.arange(120))) < 6
    want = np.where(near, 0, maps[2]).reshape(24, 5, 24, 5).max((1, 3))
    np.testing.assert_allclose(picture.finish().numpy(), want, atol=2e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--threshold", "2"], "0..1"),
        (["--threshold", "0.5", "--top", "3"], "one of threshold, top and band"),
        (["--format", "zarr", "--top", "3"], "whole map"),
        (["--band", "3"], "no pair would be written"),
        (["--top", "0"], "at least 1"),
        (["--max-memory", "1K"], "max-memory"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_made(model, fasta, tmp_path, args, message):
    result = run(fasta, "-o", tmp_path / "out", "--model", model, *args)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_missing_matplotlib_is_said_before_the_work(model, fasta, tmp_path, monkeypatch):
    monkeypatch.setattr("longlens.report.figures.has_matplotlib", lambda: False)
    result = run(fasta, "-o", tmp_path / "out", "--model", model, "--figure")
    assert isinstance(result.exception, InputError)
    assert "longlens[plot]" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_other_input_or_options_are_another_job(model, fasta, tmp_path):
    make(model, fasta, tmp_path / "out", "--top", 3)
    result = run(fasta, "-o", tmp_path / "out", "--model", model, "--top", 4)
    assert isinstance(result.exception, InputError)
    assert "options.top: was 3, is 4" in str(result.exception)


def test_no_head_and_no_proteins(tmp_path, fasta):
    result = run(fasta, "-o", tmp_path / "out", "--model", "tiny")
    assert "has no contact head" in str(result.exception)
    (tmp_path / "empty.fasta").write_text("")
    assert isinstance(run(tmp_path / "empty.fasta", "-o", tmp_path / "out").exception, SequenceError)


def test_help_names_both_commands():
    assert "fit" in run("--help").output
    assert "--threshold" in run("map", "--help").output
