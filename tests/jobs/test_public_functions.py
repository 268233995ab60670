"""The commands' work as functions: results in memory, by id, as data frames and in notebooks."""

from __future__ import annotations

import gc
import inspect
import json
import sys
import types

import click
import numpy as np
import pyarrow as pa
import pytest
import torch

import longlens
from esm_peer import esm, protein, save
from longlens.cli.contacts import map_
from longlens.cli.embed import embed
from longlens.cli.look import look
from longlens.cli.score import score
from longlens.errors import InputError, LonglensWarning
from longlens.io.alphabet import STANDARD
from longlens.jobs.fit_contacts import HEAD
from longlens.models.pretrained import load

PROTEINS = {"one": protein(30, 1), "two": protein(9, 2)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    theirs = esm(2, 32, 4)
    theirs.esm.contact_head.regression.weight.data.normal_(0, 3)
    return load(save(theirs, tmp_path_factory.mktemp("model")))


@pytest.fixture
def pandas(monkeypatch):
    """Enough of pandas to see what it is given."""

    class DataFrame:
        def __init__(self, columns):
            self.columns, self.index = dict(columns), []
            assert len({len(column) for column in self.columns.values()}) == 1

        def set_index(self, names):
            self.index = [self.columns.pop(name) for name in names]
            return self

    # pyarrow looks for pandas once, at its first conversion
    pa.array([1])
    module = types.ModuleType("pandas")
    module.DataFrame = DataFrame
    monkeypatch.setitem(sys.modules, "pandas", module)


def hidden(model, name):
    packed = model.pack([PROTEINS[name]])
    return model(packed, keep=[2]).layers[2][1:-1].numpy()


def test_vectors_by_id(model, pandas):
    embeddings = longlens.embed(PROTEINS, model=model, include=("mean", "per-tok", "surprise"), layers="all")
    assert (list(embeddings), len(embeddings), embeddings.skipped) == (list(PROTEINS), 2, [])
    assert embeddings.names[:3] == ["entropy", "excess", "mean/0"]
    for number, name in enumerate(PROTEINS):
        np.testing.assert_allclose(embeddings[name], hidden(model, name).mean(0), atol=1e-5)
        np.testing.assert_array_equal(embeddings[number], embeddings[name])
        np.testing.assert_allclose(embeddings.residues("per_tok/2", name), hidden(model, name), atol=1e-5)
        np.testing.assert_array_equal(embeddings.get("mean/0", name), embeddings.array("mean/0")[number])
        opened = longlens.open_results(embeddings.folder)
        for which in (name, number, opened.table[number]):
            np.testing.assert_array_equal(opened.residues("surprise", which), embeddings.residues("surprise", name))
    with pytest.raises(InputError, match="got 'three'; none has it"):
        embeddings["three"]
    with pytest.raises(InputError, match=r"number in 0\.\.1, got 2"):
        embeddings[2]
    with pytest.raises(InputError, match="a row for each residue"):
        embeddings.residues("mean/2", "one")
    frame = embeddings.to_frame()
    assert frame.index == [["one", "two"]]
    np.testing.assert_array_equal(np.stack(list(frame.columns.values()), 1), embeddings.array("mean/2"))
    frame = embeddings.to_frame("surprise")
    assert frame.index[1].tolist() == [*range(1, 31), *range(1, 10)]
    assert frame.index[0].tolist() == ["one"] * 30 + ["two"] * 9
    assert "embeddings of 2 proteins" in embeddings._repr_html_()
    assert "<td>one</td><td>30</td>" in embeddings._repr_html_()


def test_an_id_that_two_have_is_not_guessed(model, tmp_path):
    (tmp_path / "p.fasta").write_text(">a\nMK\n>a\nGA\n>b\nM2\n")
    with pytest.warns(LonglensWarning, match="1 record is skipped"):
        embeddings = longlens.embed(tmp_path / "p.fasta", model=model, on_error="skip")
    with pytest.raises(InputError, match="2 records have it: use the number"):
        embeddings["a"]
    assert embeddings[0].shape == (32,)
    with pytest.raises(InputError, match="got '2' at position 2"):
        embeddings["b"]
    assert [row["id"] for row in embeddings.skipped] == ["b"]
    assert "problem" in embeddings._repr_html_()


def test_results_in_memory_leave_nothing_behind(model):
    embeddings = longlens.embed("MKTAYI", model=model)
    folder = embeddings.folder
    assert (folder / "arrays.h5").is_file()
    assert embeddings[0].shape == (32,)
    del embeddings
    gc.collect()
    assert not folder.exists()


def test_a_refused_job_leaves_no_temporary_folder(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("longlens.jobs.embed.EmbedJob.compute", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        longlens.embed("MKTAYI", model=model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["parquet", "npz", "zarr"])
def test_contact_maps_by_id(model, pandas, kind):
    keep = {} if kind == "zarr" else {"threshold": 0.0, "min_separation": 1}
    maps = longlens.contacts(PROTEINS, model=model, format=kind, array_dtype="float32", **keep)
    wanted = dict(zip(PROTEINS, model.predict_contacts(list(PROTEINS.values())), strict=True))
    for name in maps:
        want = wanted[name].numpy()
        off = ~np.eye(len(want), dtype=bool)
        np.testing.assert_allclose(maps.matrix(name)[off], want[off], atol=2e-6)
        pairs = maps[name]
        assert (pairs["i"] < pairs["j"]).all()
        np.testing.assert_allclose(pairs["probability"], want[pairs["i"] - 1, pairs["j"] - 1], atol=2e-6)
    frame = maps.to_frame()
    assert len(frame.columns["id"]) == 30 * 29 // 2 + 9 * 8 // 2
    assert "contact maps of 2 proteins" in maps._repr_html_()


@pytest.mark.parametrize("kind", ["parquet", "npz", "zarr"])
def test_contact_maps_are_drawn(model, monkeypatch, kind):
    keep = {} if kind == "zarr" else {"threshold": 0.0, "min_separation": 1}
    maps = longlens.contacts(PROTEINS, model=model, format=kind, array_dtype="float32", **keep)
    monkeypatch.setattr("longlens.jobs.contact_maps.CELLS", 10)
    monkeypatch.setattr("longlens.jobs.contact_maps.ELEMENTS", 70)
    figure = maps.draw("one")
    matrix = maps.matrix("one")
    if kind != "zarr":
        assert (matrix.diagonal() == 0).all()
    np.testing.assert_array_equal(figure.axes[0].get_images()[0].get_array(), matrix.reshape(10, 3, 10, 3).max((1, 3)))
    assert "one, 30 residues" in figure.axes[0].get_title()
    assert "data:image/png;base64," in maps._repr_html_()


def test_substitutions_are_drawn(model):
    substitutions = longlens.score({"p": "MKTAYIAK"}, model=model, offset_idx=5)
    figure = substitutions.draw()
    assert f"p, {substitutions.model}, masked-marginals" in figure.get_suptitle() + figure.axes[0].get_title()
    assert "data:image/png;base64," in substitutions._repr_html_()
    assert repr(substitutions) == f"<all substitutions of 8 residues by {substitutions.model}>"


def test_scores_and_substitutions(model, pandas, tmp_path):
    text = "MKTAYIAK"
    matrix = longlens.score(text, model=model)
    assert matrix.matrix.shape == (8, 20)
    assert matrix["M1M"] == 0
    variants = ["K2A", "K2A:T3S", "WT", "K2*"]
    with pytest.raises(InputError, match="line 4"):
        longlens.score(text, variants, model=model)
    scores = longlens.score({"p": text}, variants, model=model, on_error="skip", output=tmp_path / "s.csv")
    assert scores["K2A"] == pytest.approx(matrix["K2A"], abs=1e-5) == matrix.matrix[1, STANDARD.index("A")]
    assert scores["K2A:T3S"] == pytest.approx(matrix["K2A"] + matrix["T3S"], abs=1e-5)
    assert scores["WT"] == 0
    assert np.isnan(scores.scores[3])
    assert (scores.skipped, scores.problems[3]) == (1, "stop")
    assert (tmp_path / "s.csv").read_text() == scores.text
    assert list(scores.to_frame().columns) == ["mutant", scores.model, "problem"]
    assert list(matrix.to_frame().columns) == ["position", "wild_type", *STANDARD]
    assert "4 variants" in scores._repr_html_()
    assert longlens.score(text, "K2A", model=model).scores.shape == (1,)
    with pytest.raises(KeyError):
        matrix["A2K"]
    with pytest.raises(InputError, match="pseudo-ppl would need"):
        longlens.score(text, model=model, scoring_strategy="pseudo-ppl")
    with pytest.raises(InputError, match="expected one protein, found 2"):
        longlens.score(PROTEINS, model=model)


def test_looks_by_id(model, pandas):
    looks = longlens.look(PROTEINS, model=model, figures=False, layers=[1], heads=[0], collect=["entropy", "pooled"])
    assert list(looks) == list(PROTEINS)
    assert looks["one"]["rows"]["entropy"].shape == (32,)
    assert looks["two"]["overview"]["layer"].tolist() == [1]
    assert set(looks["two"]) == {"overview", "pooled", "rows", "tokens"}
    assert "label" in looks.to_frame("one").columns
    with pytest.raises(InputError, match="expected a table of overview, rows, tokens"):
        looks.to_frame("one", "surprise")
    assert "attention of 2" in looks._repr_html_()


def test_a_look_shows_its_first_figure(model):
    pytest.importorskip("matplotlib")
    looks = longlens.look({"one": PROTEINS["one"]}, model=model, collect=["entropy"], layers="all")
    assert [path.name for path in looks.figures("one")] == ["overview.png"]
    assert "data:image/png;base64," in looks._repr_html_()


def test_without_pandas_the_extra_is_named(model, monkeypatch):
    # pyarrow, which writes the results, looks for pandas once, and must not meet the None
    embeddings = longlens.embed("MKT", model=model)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"longlens\[notebook\]"):
        embeddings.to_frame()


@pytest.mark.parametrize(("command", "function"), [
    (embed, longlens.embed), (map_, longlens.contacts), (score, longlens.score), (look, longlens.look),
])  # fmt: skip
def test_functions_take_the_words_of_their_commands(command, function):
    """Every option is an argument, by the long name that the command gives it."""
    other = {"fasta": "proteins", "sequence": "proteins", "all": None, "source": "source", "variants": "variants"}
    other["proteingym"] = "assays"
    arguments = set(inspect.signature(function).parameters)
    if function is longlens.score:
        # the command of two functions
        arguments |= set(inspect.signature(longlens.score_proteingym).parameters)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            words = [name[2:].replace("-", "_") for name in parameter.opts if name.startswith("--")]
        else:
            words = [parameter.name]
        wanted = [other.get(word, word) for word in words]
        assert None in wanted or arguments & set(wanted), parameter.name


def test_a_data_frame_is_no_list_of_proteins(model):
    class DataFrame(dict):
        columns = ("id", "sequence")

    with pytest.raises(InputError, match=r"dict\(zip\("):
        longlens.embed(DataFrame(), model=model)


def test_a_head_of_a_file_is_not_left_in_the_callers_model(model, tmp_path):
    from safetensors.torch import save_file

    config = model.config
    head = {"weight": torch.zeros(config.layers, config.heads), "bias": torch.zeros(1)}
    save_file(head, tmp_path / "head.safetensors", {HEAD: json.dumps({"model": "none"})})
    before = model.predict_contacts(PROTEINS["one"])[0]
    maps = longlens.contacts(PROTEINS, model=model, head=tmp_path / "head.safetensors", threshold=0.0)
    assert set(maps["one"]["probability"]) == {0.5}
    torch.testing.assert_close(model.predict_contacts(PROTEINS["one"])[0], before)


def test_options_in_python_are_checked_as_on_the_command_line(model):
    sequence = {"p": "MKTAYIAK"}
    assert longlens.embed(sequence, model=model, method=longlens.Window(4)).array("mean/2").shape == (1, 32)
    looks = longlens.look(sequence, model=model, layers=["all"], collect="entropy", figures=False)
    assert len(looks["p"]["rows"]["entropy"]) == 2 * 4 * 10
    for call, message in (
        (lambda: longlens.look(sequence, model=model, layers="last"), "whole numbers or 'all'"),
        (lambda: longlens.score(sequence, model=model, tokens_per_batch="auto"), "tokens_per_batch as a whole number"),
        (lambda: longlens.embed(sequence, model=model, max_memory=16), "such as '16G'"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_more_partners_than_residues(model):
    maps = longlens.contacts(PROTEINS, model=model, top=10**9, min_separation=1)
    assert len(maps["two"]["i"]) == 9 * 8
