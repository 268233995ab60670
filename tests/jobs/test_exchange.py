"""Results pass to anndata, polars, pandas, DuckDB and pyarrow, and show themselves in notebooks."""

from __future__ import annotations

import json
import re
import sys

import anndata
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

import longlens
import text_models as texts
from esm_peer import esm, protein, save
from longlens.errors import InputError
from longlens.lens import Entropy
from longlens.models.pretrained import load
from longlens.report.coloured import LINE, LINES, coloured_html

LENGTHS = (30, 9, 12, 5)
IDS = ("sp|P69905|HBA", "two", "two", "four")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    theirs = esm(2, 32, 4)
    theirs.esm.contact_head.regression.weight.data.normal_(0, 3)
    return load(save(theirs, tmp_path_factory.mktemp("human")))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("proteins") / "p.fasta"
    records = [f">{id} about it\n{protein(n, n)}\n" for id, n in zip(IDS, LENGTHS, strict=True)]
    # the third record cannot be read
    path.write_text("".join([*records[:2], ">bad\nM2\n", *records[2:]]))
    return path


@pytest.fixture(scope="module")
def embeddings(model, fasta):
    include = ["mean", "bos", "per-tok", "surprise"]
    return longlens.embed(fasta, model=model, include=include, layers=[0, -1], on_error="skip", progress=lambda _: None)


def test_anndata_writes_and_reads_the_vectors(embeddings, tmp_path):
    made = embeddings.to_anndata()
    made.write_h5ad(tmp_path / "v.h5ad")
    read = anndata.read_h5ad(tmp_path / "v.h5ad")
    np.testing.assert_array_equal(read.X, embeddings.array("mean/2"))
    assert read.X.dtype == np.float32
    # the index is unique, and the ids are as they were; the skipped record is left out
    assert list(read.obs_names) == ["sp|P69905|HBA", "two", "two_2", "four"]
    assert list(read.obs["id"]) == list(IDS)
    assert list(read.obs["accession"]) == ["P69905", "", "", ""]
    assert list(read.obs["length"]) == list(LENGTHS)
    np.testing.assert_allclose(read.obs["surprise"], [row["surprise"] for row in embeddings.table[:4]])
    assert {"row", "start", "problem"}.isdisjoint(read.obs.columns)
    name = embeddings.model
    assert sorted(read.obsm) == sorted([f"X_{name}_0", f"X_{name}_bos_0", f"X_{name}_bos_2"])
    np.testing.assert_array_equal(read.obsm[f"X_{name}_0"], embeddings.array("mean/0"))
    np.testing.assert_array_equal(read.obsm[f"X_{name}_bos_2"], embeddings.array("bos/2"))
    about = read.uns["longlens"]
    assert (about["model"], about["array"]) == (name, "mean/2")
    assert json.loads(about["manifest"])["model"]["name"] == name
    opened = longlens.open_results(embeddings.folder).to_anndata("bos/0")
    np.testing.assert_array_equal(opened.X, embeddings.array("bos/0"))
    assert f"X_{name}_2" in opened.obsm


def test_what_anndata_cannot_hold_is_refused(embeddings, model, monkeypatch):
    with pytest.raises(InputError, match=r"expected an array with a vector for.*got 'per_tok/2', which has other rows"):
        embeddings.to_anndata("per_tok/2")
    with pytest.raises(InputError, match="got 'mean/7', which the results do not have"):
        embeddings.to_anndata("mean/7")
    alone = longlens.embed("MKTAYI", model=model, include="surprise")
    with pytest.raises(InputError, match="embed with --include mean"):
        alone.to_anndata()
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(InputError, match=r"longlens\[anndata\]"):
        embeddings.to_anndata()


def same_in_every_reader(result, rows, names):
    """The table as polars reads it, after pandas, DuckDB and pyarrow have read the same."""
    by_polars = pl.DataFrame(result)
    by_pandas = pd.DataFrame.from_arrow(result)
    by_duckdb = duckdb.from_arrow(pa.table(result)).fetchall()
    assert by_polars.shape == by_pandas.shape == (rows, len(names))
    assert list(by_polars.columns) == list(by_pandas.columns) == pa.table(result).column_names == names
    assert len(by_duckdb) == rows
    assert (duckdb.sql("select count(*) from result").fetchall()) == [(rows,)]
    return by_polars


def test_embeddings_are_a_table_with_vectors(embeddings):
    names = [*embeddings.table[0], "bos/0", "bos/2", "mean/0", "mean/2"]
    table = same_in_every_reader(embeddings, 5, names)
    assert table["mean/2"].dtype == pl.Array(pl.Float32, 32)
    np.testing.assert_array_equal(table["mean/2"][:4].to_numpy(), embeddings.array("mean/2"))
    assert table["mean/2"][4] is None
    assert table["problem"].is_null().to_list() == [True] * 4 + [False]
    assert pl.DataFrame(longlens.open_results(embeddings.folder)).equals(table)


def test_arrays_of_float16_are_passed_on_as_float32(model):
    half = longlens.embed("MKTAYI", model=model, array_dtype="float16")
    assert pl.DataFrame(half)["mean/2"].dtype == pl.Array(pl.Float32, 32)
    np.testing.assert_array_equal(pl.DataFrame(half)["mean/2"].to_numpy(), half.array("mean/2").astype(np.float32))


@pytest.mark.parametrize(("kind", "keep"), [
    ("parquet", {"threshold": 0.0, "min_separation": 1}), ("npz", {"threshold": 0.0, "min_separation": 1}),
    ("parquet", {"top": 2}), ("zarr", {}), ("parquet", {"threshold": 1.0}),
])  # fmt: skip
def test_contacts_are_a_table_of_pairs(model, kind, keep, monkeypatch):
    monkeypatch.setattr("longlens.jobs.contact_maps.ELEMENTS", 70)
    maps = longlens.contacts({"one": protein(30, 1), "two": protein(9, 2)}, model=model, format=kind, **keep)
    frame = maps.to_frame()
    table = same_in_every_reader(maps, len(frame), ["id", "i", "j", "probability"])
    for name in table.columns:
        np.testing.assert_array_equal(
            table[name].to_numpy(), frame[name].to_numpy().astype(table[name].to_numpy().dtype)
        )


def test_scores_are_tables(model):
    scores = longlens.score("MKTAYIAKQR", ["K2A", "T3S:A4G", "WT"], model=model)
    table = same_in_every_reader(scores, 3, ["mutant", scores.column])
    np.testing.assert_array_equal(table[scores.column].to_numpy(), scores.scores)
    every = longlens.score("MKTAYIAKQR", model=model)
    table = same_in_every_reader(every, 10, ["position", "wild_type", *every.residues])
    np.testing.assert_array_equal(table.select(list(every.residues)).to_numpy(), every.matrix)
    page = every._repr_html_()
    assert "<script" not in page
    assert len(re.findall(r'title="[A-Z] \d+: ', page)) == 10


def test_looks_and_statistics_are_tables(model):
    looks = longlens.look({"one": protein(30, 1), "two": protein(9, 2)}, model=model, figures=False)
    tokens = [looks.to_frame(number, "tokens") for number in range(2)]
    table = same_in_every_reader(looks, 32 + 11, ["id", *tokens[0].columns])
    assert table["id"].to_list() == ["one"] * 32 + ["two"] * 11
    np.testing.assert_array_equal(table["surprise"].to_numpy(), pd.concat(tokens)["surprise"].to_numpy())
    page = looks._repr_html_()
    assert "<script" not in page
    assert len(re.findall(r'title="[A-Z] \d+: ', page)) == 30
    with torch.no_grad(), longlens.watch(model, [Entropy()]) as seen:
        model(model.pack("MKTAYIAK"))
    same_in_every_reader(seen.entropy, 2 * 4 * 10, ["layer", "batch", "head", "query", "entropy"])


def test_coloured_residues_are_escaped_and_bounded():
    page = coloured_html(["<b>", "&", "K", "M"], [0.0, 1.0, np.nan, 2.0], name="a < b", first=7)
    assert "<b>" not in page
    assert "a &lt; b, from 0 " in page
    assert 'background:rgb(255,255,255);color:#000" title="&lt;b&gt; 7: 0"' in page
    assert "rgb(240,128,96)" in page
    assert "<span>K</span>" in page
    many = coloured_html("A" * 10_000, np.arange(10_000), name="x")
    assert many.count("<span") == LINE * LINES
    assert f"<p>{LINE * LINES:,} of 10,000</p>" in many
    assert "rgb(255,255,255)" in coloured_html("AA", [3.0, 3.0], name="equal")
    assert "<span>A</span>" in coloured_html("A", [np.nan], name="none")


def test_surprise_and_comparisons_of_texts_are_tables(tmp_path):
    folders = [texts.gpt2_folder(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times,\nit was the worst of <b>times</b>.\n")
    for by in ("token", "word", "line"):
        found = longlens.surprise(path, model=folders[0], by=by)
        table = same_in_every_reader(found, len(found), list(found.columns()))
        np.testing.assert_array_equal(table["surprise"].to_numpy(), found["surprise"])
        page = found._repr_html_()
        assert ("background:rgb" in page) == (by != "line")
        assert "<b>times" not in page
    both = longlens.compare_models(*folders, path)
    table = same_in_every_reader(both, len(both), list(both.columns()))
    np.testing.assert_array_equal(table["kl_ab"].to_numpy(), both["kl_ab"])
