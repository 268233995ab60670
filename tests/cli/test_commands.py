"""What the commands over proteins refuse, warn of, and print, beside what their jobs compute."""

from __future__ import annotations

import importlib.util
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from contact_lists import contact_list
from esm_peer import esm, protein, save
from longlens.cli.main import cli
from longlens.errors import InputError
from longlens.jobs import runner

WILD = "MKTAYIAKQRQISFVKSHFS"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save(esm(2, 32, 4), tmp_path_factory.mktemp("model"))


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "p.fasta"
    path.write_text(f">a\n{protein(20, 0)}\n>b\n{protein(7, 1)}\n")
    return path


def run(*arguments, **keywords):
    return CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False, **keywords)


def test_the_model_is_named_and_tiny_by_default_is_warned_of(model_folder, fasta, tmp_path):
    result = run("embed", fasta, "-o", tmp_path / "a")
    assert "no --model was named, so `tiny` is used" in result.stderr
    assert "model tiny (tiny), float32 on cpu" in result.stderr
    assert re.search(r"^model +tiny *$", result.stdout, re.M)
    for arguments in (["embed"], ["contacts"], ["look", "--no-figures"]):
        result = run(*arguments, fasta, "-o", tmp_path / arguments[0], "-m", model_folder)
        assert result.exception is None
        assert f"model {model_folder.name} ({model_folder}), float32 on cpu" in result.stderr
        assert "no --model" not in result.stderr
    assert "no --model was named" not in run("embed", fasta, "-o", tmp_path / "named", "-m", "tiny").stderr


def test_masked_surprise_has_to_be_included(fasta, tmp_path):
    result = run("embed", fasta, "-o", tmp_path / "out", "--surprise", "masked")
    assert isinstance(result.exception, InputError)
    assert "add surprise to --include" in str(result.exception)


@pytest.mark.parametrize("option", ["--layers", "--repr_layers", "--repr-layers=all"])
def test_all_layers(model_folder, fasta, tmp_path, option):
    import h5py

    word = [] if "=" in option else ["all"]
    result = run("embed", fasta, "-o", tmp_path / "out", "-m", model_folder, option, *word)
    assert result.exception is None, result.exception
    with h5py.File(tmp_path / "out" / "arrays.h5") as file:
        assert sorted(file["mean"]) == ["0", "1", "2"]


def test_all_layers_of_a_look(model_folder, fasta, tmp_path):
    result = run("look", fasta, "-o", tmp_path / "out", "-m", model_folder, "--layers", "all", "--no-figures")
    assert result.exception is None, result.exception
    assert "layers 0,1" in result.stdout


def test_no_layer_is_named_so(model_folder, fasta, tmp_path):
    for command in ("embed", "look"):
        result = run(command, fasta, "-o", tmp_path / "out", "-m", model_folder, "--layers", "every")
        assert "whole number" in str(result.exception.message)


@pytest.mark.parametrize("command", ["embed", "contacts"])
def test_a_missing_zarr_is_said_before_the_work(command, model_folder, fasta, tmp_path, monkeypatch):
    genuine = importlib.util.find_spec
    monkeypatch.setattr("longlens.io.formats.find_spec", lambda name: None if name == "zarr" else genuine(name))
    result = run(command, fasta, "-o", tmp_path / "out", "-m", model_folder, "--format", "zarr")
    assert isinstance(result.exception, InputError)
    assert "longlens[zarr]" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_dna_is_warned_of(model_folder, tmp_path):
    (tmp_path / "genes.fasta").write_text(">gene\nATGGCCATTGTAATGGGCCGCTGAAAGGGTGCCCGATAG\n")
    result = run("embed", tmp_path / "genes.fasta", "-o", tmp_path / "out", "-m", model_folder)
    assert result.return_value == 0
    assert "warning: 1 of 1 records look like DNA or RNA" in result.stderr


def test_what_was_skipped_is_said_and_exits_with_3(model_folder, tmp_path):
    (tmp_path / "p.fasta").write_text(">a\nMK\n>b\nM2\n")
    result = run("embed", tmp_path / "p.fasta", "-o", tmp_path / "out", "-m", model_folder, "--on-error", "skip")
    assert result.return_value == 3
    assert "1 record is skipped; the first: " in result.stderr


@pytest.mark.parametrize("text", [">a\nMK\n>b\nGA\n", ">a\nMK\n>b\nM2\n"])
@pytest.mark.parametrize("command", ["embed", "contacts"])
def test_columns_have_one_type_whatever_is_in_them(command, text, model_folder, tmp_path):
    (tmp_path / "p.fasta").write_text(text)
    run(command, tmp_path / "p.fasta", "-o", tmp_path / "out", "-m", model_folder, "--on-error", "skip")
    schema = pq.read_schema(tmp_path / "out" / "index.parquet")
    assert schema.field("problem").type == pa.string()
    whole = ["record", "length", "substituted", "gaps"] + (
        ["row", "start", "stop"] if command == "embed" else ["pairs"]
    )
    for name in whole:
        assert schema.field(name).type == pa.int64()
    # what pandas makes of them: its own whole numbers, in which some may be missing
    kinds = {column["name"]: column["numpy_type"] for column in schema.pandas_metadata["columns"]}
    assert {kinds[name] for name in whole} == {"Int64"}
    assert kinds["problem"] == "object"


def test_a_text_for_a_transformers_model_of_proteins_is_refused(model_folder, tmp_path):
    from transformers import EsmTokenizer

    from longlens.io.alphabet import ESM

    (model_folder / "vocab.txt").write_text("\n".join(ESM.tokens))
    EsmTokenizer(model_folder / "vocab.txt").save_pretrained(model_folder)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times.\n")
    result = run("look", tmp_path / "text.txt", "-o", tmp_path / "out", "-m", model_folder, "--no-figures")
    assert isinstance(result.exception, InputError)
    assert "whose tokens are residues of proteins" in str(result.exception)


def test_titles_name_the_model_and_not_the_folder_called_model(tmp_path, fasta):
    pytest.importorskip("matplotlib")
    folder = save(esm(2, 32, 4), tmp_path / "human" / "model")
    run("look", fasta, "-o", tmp_path / "out", "-m", folder, "--record", "a", "--collect", "entropy")
    text = re.sub(r"<[^>]*>", " ", (tmp_path / "out" / "1_a" / "overview.svg").read_text())
    assert re.search(r"\bhuman\b", text), text[:2000]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "v.csv"
    path.write_text("mutant\nM1A\n")
    return path


def test_score_names_its_model_and_every_command_warns_of_tiny(model_folder, fasta, table, tmp_path):
    score = ["score", table, "--sequence", WILD]
    result = run(*score, "-m", model_folder)
    assert f"({model_folder}), float32 on cpu" in result.stderr
    assert "no --model" not in result.stderr
    for arguments in (score, ["look", fasta, "-o", tmp_path / "look", "--no-figures"],
                      ["contacts", fasta, "-o", tmp_path / "contacts"],
                      ["contacts", "fit", *contact_list(tmp_path), "-o", tmp_path / "head.safetensors"]):  # fmt: skip
        assert "no --model was named, so `tiny` is used" in run(*arguments).stderr


def test_every_command_that_computes_takes_threads(model_folder, fasta, table, tmp_path, monkeypatch):
    seen, before, genuine = [], torch.get_num_threads(), runner._work
    monkeypatch.setattr(runner, "_work", lambda *a: (seen.append(torch.get_num_threads()), genuine(*a)))
    for arguments in (["contacts", fasta, "-o", tmp_path / "contacts"],
                      ["look", fasta, "-o", tmp_path / "look", "--no-figures"],
                      ["score", table, "--sequence", WILD],
                      ["contacts", "fit", *contact_list(tmp_path), "-o", tmp_path / "head.safetensors"]):  # fmt: skip
        run(*arguments, "-m", model_folder, "--threads", before + 1)
    assert seen == [before + 1] * 4
    assert torch.get_num_threads() == before
    for command in ("train", "plan"):
        assert "--threads" in CliRunner().invoke(cli, [command, "--help"]).stdout


def test_the_command_prints_its_progress_without_a_terminal(model_folder, table):
    result = run("score", table, "--sequence", WILD, "-m", model_folder, "--scoring-strategy", "pseudo-ppl")
    assert re.search(r"^longlens: score: 20 of 20 positions", result.stderr, re.M)
    assert result.stdout.startswith("mutant,")


def test_a_command_without_a_terminal_prints_lines(fasta, tmp_path):
    result = run("embed", fasta, "-o", tmp_path / "out")
    assert result.exception is None
    assert "longlens: embed: 27 of 27 residues" in result.stderr


def test_titles_of_contact_maps_name_the_model(fasta, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    titles, genuine = [], axes.Axes.set_title

    def keep(self, text, **more):
        titles.append(text)
        return genuine(self, text, **more)

    monkeypatch.setattr(axes.Axes, "set_title", keep)
    folder = save(esm(2, 32, 4), tmp_path / "human" / "model")
    result = run("contacts", fasta, "-o", tmp_path / "out", "-m", folder, "--figure")
    assert result.exception is None, result.exception
    assert len(titles) == 2
    assert all(title.endswith("model human") for title in titles)
