"""Embeddings in the HDF5 formats of other tools, opened by h5py as ProtSpace does, and by scikit-bio's reader."""

from __future__ import annotations

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import longlens
from esm_peer import esm, protein, save
from longlens.cli.main import cli
from longlens.errors import InputError
from longlens.io.hdf5_formats import dataset_names
from longlens.io.results import ResultFolder
from longlens.models.pretrained import load

IDS = ["sp|P69905|HBA_HUMAN", "sp|P04637-2|P53", "sp|P04637|P53", "1abc.A/2", "same", "same", "", "same_2"]
NAMES = ["P69905", "sp|P04637-2|P53", "sp|P04637|P53", "1abc_A_2", "same", "same_3", "protein", "same_2"]
LENGTHS = [5, 30, 1, 12, 3, 8, 40, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(save(esm(2, 32, 4), tmp_path_factory.mktemp("model")))


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "p.fasta"
    path.write_text("".join(f">{id}\n{protein(n, n)}\n" for id, n in zip(IDS, LENGTHS, strict=True)))
    return path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.h5"))}


def test_a_dataset_for_each_protein(model, fasta, tmp_path):
    include, out = ["mean", "per-tok", "surprise"], tmp_path / "out"
    longlens.embed(fasta, model=model, include=include, layers=[0, -1], format="h5-by-id", output=out)
    plain = longlens.embed(fasta, model=model, include=include, layers=[0, -1])
    assert sorted(path.stem for path in (out / "by-id").iterdir()) == sorted(
        name.replace("/", "_") for name in plain.names
    )
    for name in plain.names:
        with h5py.File(out / "by-id" / f"{name.replace('/', '_')}.h5") as file:
            # what ProtSpace demands: the model's name, and datasets one level deep
            assert file.attrs["model_name"] == model.source.split("/")[-1]
            assert sorted(file) == sorted(NAMES)
            for place, (key, id) in enumerate(zip(NAMES, IDS, strict=True)):
                assert isinstance(file[key], h5py.Dataset)
                assert file[key].attrs["original_id"] == id
                np.testing.assert_array_equal(file[key][()], plain.get(name, place))
    with h5py.File(out / "by-id" / "per_tok_2.h5") as file:
        assert file["P69905"].shape == (5, 32)
    with h5py.File(out / "by-id" / "mean_2.h5") as file:
        assert file["P69905"].shape == (32,)
    assert pq.read_table(out / "index.parquet")["dataset"].to_pylist() == NAMES


def test_names_of_datasets_are_unique_whatever_the_ids():
    ids = ["a", "a_2", "a", "a.2", "a", "P69905", "AF-P69905-F1", "x/y", "x.y"]
    names = dataset_names(ids)
    assert len(set(names)) == len(ids)
    assert names == ["a", "a_2", "a_3", "a_2_2", "a_4", "P69905", "AF-P69905-F1", "x_y", "x_y_2"]


def test_scikit_bio_reads_its_own_format(model, fasta, tmp_path):
    import skbio
    from skbio.embedding import ProteinEmbedding, ProteinVector
    from skbio.io.format.embed import _embed_to_generator

    out = tmp_path / "out"
    longlens.embed(fasta, model=model, include=["per-tok", "mean"], format="scikit-bio", output=out)
    plain = longlens.embed(fasta, model=model, include=["per-tok", "mean"])
    sequences = [protein(n, n) for n in LENGTHS]
    read = list(skbio.io.read(str(out / "scikit-bio" / "per_tok_2.h5"), format="embed", constructor=ProteinEmbedding))
    # the last protein is there, which scikit-bio's own writer loses
    assert [str(item) for item in read] == sequences
    for place, item in enumerate(read):
        np.testing.assert_array_equal(item.embedding, plain.residues("per_tok/2", place))
    with (out / "scikit-bio" / "mean_2.h5").open("rb") as file:
        vectors = list(_embed_to_generator(file, constructor=ProteinVector))
    assert [str(item) for item in vectors] == sequences
    np.testing.assert_array_equal(np.concatenate([item.embedding for item in vectors]), plain.array("mean/2"))
    # recognised without a name of the format, and one protein as one object
    longlens.embed("MKTAYI", model=model, include="per-tok", format="scikit-bio", output=tmp_path / "one")
    path = tmp_path / "one" / "scikit-bio" / "per_tok_2.h5"
    one = skbio.read(str(path), into=ProteinEmbedding)
    assert (str(one), one.embedding.shape) == ("MKTAYI", (6, 32))
    with h5py.File(path) as file:
        assert (file.attrs["format"], file.attrs["format-version"]) == ("embedding", "1.0")
        assert (file.attrs["dtype"], file.attrs["dim"]) == ("float32", 32)
        assert {file[name].dtype.name for name in ("idptr", "embedding_ptr")} == {"int32"}


@pytest.mark.parametrize("format_", ["h5-by-id", "scikit-bio"])
def test_stopped_it_goes_on_to_the_same_bytes(format_, model, fasta, tmp_path, monkeypatch):
    more = {"model": model, "include": ["mean", "per-tok"], "format": format_, "tokens_per_batch": 20}
    longlens.embed(fasta, output=tmp_path / "whole", **more)
    commit, units = ResultFolder.commit, []

    def stopping(self, unit):
        commit(self, unit)
        units.append(unit)
        if len(units) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultFolder, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        longlens.embed(fasta, output=tmp_path / "cut", **more)
    longlens.embed(fasta, output=tmp_path / "cut", **more)
    assert units == list(range(len(units)))
    assert len(contents(tmp_path / "whole")) == 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    tables = [(tmp_path / name / "index.parquet").read_bytes() for name in ("cut", "whole")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "scikit-bio", "--include", "mean", "surprise"], "expected vectors for the format scikit-bio"),
        (["--format", "scikit-bio", "--include", "logits"], "choose another format"),
        (["--format", "scikit-bio", "--array-dtype", "float16"], "expected float32 for the format scikit-bio"),
    ],
)
def test_what_scikit_bio_cannot_hold_is_refused_before_the_work(options, message, fasta, tmp_path):
    result = CliRunner().invoke(
        cli, ["embed", str(fasta), "-o", str(tmp_path / "out"), *options], standalone_mode=False
    )
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_format_that_does_not_exist_is_refused_with_those_that_do(fasta, tmp_path):
    with pytest.raises(InputError, match=r"expected format of h5, h5-by-id, scikit-bio, .*, got hdf"):
        longlens.embed(fasta, format="hdf", output=tmp_path / "out")


def test_files_for_other_programs_are_not_opened_as_ours(model, fasta, tmp_path):
    embeddings = longlens.embed(fasta, model=model, format="h5-by-id", output=tmp_path / "out")
    with pytest.raises(InputError, match=r"expected arrays\.h5.*read other formats with the tools they are for"):
        embeddings[0]
