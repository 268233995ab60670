"""Folders of results in which a file was removed, cut off or changed: the commands that read them name the file."""

from __future__ import annotations

import shutil

import pytest
from click.testing import CliRunner

import longlens
from esm_peer import esm, save
from longlens.cli.main import cli
from longlens.errors import InputError
from longlens.models.pretrained import load
from written_structures import Part, cif_text

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDG"
DAMAGE = {
    "empty": lambda data: b"", "cut": lambda data: data[: len(data) // 2],
    "bytes": lambda data: bytes(range(256)) * 20, "latin-1": lambda data: '{"a": "é"}'.encode("latin-1"),
}  # fmt: skip
# results, a file of them that the command reads, and what the message names
FILES = [
    ("embed", "h5", "index.parquet", "index.parquet"), ("embed", "h5", "arrays.h5", "arrays.h5"),
    ("embed", "npz", "arrays.npz", "arrays.npz"),
    ("embed", "zarr", "arrays.zarr/zarr.json", "arrays.zarr"),
    ("embed", "zarr", "arrays.zarr/surprise/zarr.json", "arrays.zarr"),
    ("embed", "zarr", "arrays.zarr/surprise/c/0", "arrays.zarr"),
    ("look", "", "1_s_A/tokens.parquet", "tokens.parquet"), ("context", "", "1_s_A/keys.parquet", "keys.parquet"),
    ("contacts", "parquet", "index.parquet", "index.parquet"),
    ("contacts", "parquet", "0000001.parquet", "0000001.parquet"), ("contacts", "npz", "0000001.npz", "0000001.npz"),
    ("contacts", "rr", "0000001.rr", "0000001.rr"), ("contacts", "zarr", "0000001.zarr/zarr.json", "0000001.zarr"),
    ("contacts", "zarr", "0000001.zarr/c/0/0", "0000001.zarr"),
]  # fmt: skip
COLUMN = {"embed": "surprise", "look": "received", "context": "estimate"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    model, protein = load(save(esm(1, 32, 4), path / "model")), {"s_A": SEQUENCE}
    # residues in a row and back, so that some of all ranges are in contact
    atoms = {place: (3.8 * min(place, 42 - place), 5.0 * (place > 21), 0.0) for place in range(43)}
    (path / "s.cif").write_text(cif_text([Part("A", SEQUENCE, range(43), coordinates=atoms)]))
    for kind in ("h5", "npz", "zarr"):
        longlens.embed(protein, model=model, include="surprise", format=kind, output=path / f"embed{kind}")
    for kind in ("parquet", "npz", "rr", "zarr"):
        longlens.contacts(protein, model=model, format=kind, output=path / f"contacts{kind}",
                          **({} if kind == "zarr" else {"threshold": 0.0}))  # fmt: skip
    longlens.look(protein, model=model, figures=False, output=path / "look")
    longlens.context(protein, model=model, targets="5", figures=False, output=path / "context")
    return path


def read(results, made, tmp_path):
    """The command that reads results of a kind from tmp_path / x."""
    structure, folder = str(made / "s.cif"), str(tmp_path / "x")
    words = ["contacts", "evaluate", folder, structure] if results == "contacts" else [
        "paint", structure, "--values", folder, "--column", COLUMN[results], "-o", str(tmp_path / "o.cif")
    ]  # fmt: skip
    return CliRunner().invoke(cli, words, standalone_mode=False)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("results", "kind", "file", "named"), FILES)
def test_a_damaged_file_is_named(results, kind, file, named, damage, made, tmp_path):
    shutil.copytree(made / f"{results}{kind}", tmp_path / "x")
    if damage == "empty":
        result = read(results, made, tmp_path)
        assert result.exception is None, result.exception
        (tmp_path / "o.cif").unlink(missing_ok=True)
    path = tmp_path / "x" / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    result = read(results, made, tmp_path)
    assert isinstance(result.exception, InputError), repr(result.exception)
    assert named in str(result.exception)
    assert "expected" in str(result.exception)
    assert not (tmp_path / "o.cif").exists()


@pytest.mark.parametrize(("results", "kind", "file"), [
    ("contacts", "parquet", "0000001.parquet"), ("contacts", "npz", "0000001.npz"), ("contacts", "rr", "0000001.rr"),
    ("contacts", "zarr", "0000001.zarr"), ("look", "", "1_s_A/tokens.parquet"), ("embed", "h5", "arrays.h5"),
])  # fmt: skip
def test_a_file_that_is_gone_is_missed(results, kind, file, made, tmp_path):
    shutil.copytree(made / f"{results}{kind}", tmp_path / "x")
    path = tmp_path / "x" / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = read(results, made, tmp_path)
    assert isinstance(result.exception, InputError), repr(result.exception)
    assert path.name in str(result.exception)


def test_results_in_python_say_what_is_damaged(made, tmp_path):
    shutil.copytree(made / "embedzarr", tmp_path / "x")
    results = longlens.open_results(tmp_path / "x")
    with pytest.raises(InputError, match=r"expected one of .*surprise, got 'gone'"):
        results["gone"]
    (tmp_path / "x" / "arrays.zarr" / "surprise" / "c" / "0").write_bytes(b"")
    with pytest.raises(InputError, match=r"arrays\.zarr: expected it as longlens wrote it.* run the command that made"):
        results.residues("surprise", "s_A")
