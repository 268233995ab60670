"""CASP's format RR, and the precision of contacts by range beside structures, as a plain loop over pairs counts it."""

from __future__ import annotations

import csv

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

import longlens
from esm_peer import esm, protein, save
from longlens.cli.main import cli
from longlens.errors import InputError
from longlens.io.contact_rr import read_rr, write_rr
from longlens.io.results import ResultFolder
from longlens.models.pretrained import load
from written_structures import Part, cif_text, pdb_text

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVK"
RESOLVED = [place for place in range(1, 58) if not 20 <= place < 24]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    theirs = esm(2, 32, 4)
    theirs.esm.contact_head.regression.weight.data.normal_(0, 3)
    return load(save(theirs, tmp_path_factory.mktemp("model")))


def fold(seed=0):
    """C-beta atoms in a box, so that some of all ranges are near."""
    return {place: tuple(np.random.default_rng((seed, place)).uniform(0, 24, 3).round(3)) for place in range(60)}


@pytest.fixture
def structure(tmp_path):
    path = tmp_path / "1abc.cif"
    path.write_text(cif_text([Part("A", SEQUENCE, RESOLVED, first=301, coordinates=fold())]))
    return path


RANGES = {"short": (6, 11), "medium": (12, 23), "long": (24, 10**9)}


def by_definition(scores, length, fraction, span, resolved=RESOLVED, places=None):
    """(precision, chance): the most probable pairs of a range one by one; scores by pairs of places from 0, no ties."""
    atoms = fold()
    pairs = [(i, j) for i in resolved for j in resolved if span[0] <= j - i <= span[1]]
    near = {(i, j) for i, j in pairs if np.linalg.norm(np.subtract(atoms[i], atoms[j])) < 8}
    ranked = sorted((pair for pair in pairs if pair in scores), key=lambda pair: -scores[pair])
    count = min(length // fraction, len(pairs))
    return sum(pair in near for pair in ranked[:count]) / count, len(near) / len(pairs), len(near)


@pytest.mark.parametrize("kind", ["zarr", "parquet", "npz", "rr"])
@pytest.mark.parametrize("length", ["full", "resolved"])
def test_precision_by_range(kind, length, model, structure, tmp_path, monkeypatch):
    monkeypatch.setattr("longlens.jobs.contact_maps.ELEMENTS", 300)
    keep = {} if kind == "zarr" else {"threshold": 0.0}
    maps = longlens.contacts({"1abc_A": SEQUENCE}, model=model, format=kind, array_dtype="float32", **keep)
    found = longlens.evaluate_contacts(maps, structure, length=length)
    # the numbers that the format holds, so that ties of rounding are in both
    matrix = maps.matrix(0)
    scores = {(i, j): matrix[i, j] for i in range(60) for j in range(i + 6, 60)}
    count = 60 if length == "full" else len(RESOLVED)
    assert len(found.rows) == 9
    for row in found.rows:
        precision, chance, near = by_definition(
            scores, count, {"L": 1, "L/2": 2, "L/5": 5}[row["cut"]], RANGES[row["range"]]
        )
        assert row["precision"] == pytest.approx(precision)
        assert row["chance"] == pytest.approx(chance)
        assert row["contacts"] == near
        assert (row["length"], row["resolved"], row["chain"]) == (60, len(RESOLVED), "A")
    assert pl.DataFrame(found).shape == (9, len(found.rows[0]))
    assert "precision of contacts" in found._repr_html_()


def test_the_truth_has_a_precision_of_one_and_noise_that_of_chance(structure, tmp_path):
    atoms = fold()
    i, j = np.triu_indices(60, 6)
    near = np.array([np.linalg.norm(np.subtract(atoms[a], atoms[b])) < 8 for a, b in zip(i, j, strict=True)])
    write_rr(tmp_path / "true.rr", i, j, np.where(near, 0.9, 0.1), {"id": "1abc"})
    write_rr(tmp_path / "noise.rr", i, j, np.full(len(i), 0.5), {"id": "1abc"})
    true, noise = (longlens.evaluate_contacts(tmp_path / f"{name}.rr", structure) for name in ("true", "noise"))
    for row in true.rows:
        assert row["precision"] == pytest.approx(min(1, row["contacts"] / row["count"]))
    # equal probabilities count as the expectation over their orders
    for row in noise.rows:
        assert row["precision"] == pytest.approx(row["chance"])


def test_missing_pairs_count_as_none_and_are_warned_of(structure, tmp_path):
    atoms = fold()
    near = [(i, j) for i in RESOLVED for j in RESOLVED
            if j - i >= 24 and np.linalg.norm(np.subtract(atoms[i], atoms[j])) < 8]  # fmt: skip
    i, j = near[0]
    (tmp_path / "few.rr").write_text(f"PFRMAT RR\nTARGET 1abc\nMODEL 1\n{i + 1} {j + 1} 0 8 0.9\nEND\n")
    result = CliRunner().invoke(
        cli, ["contacts", "evaluate", str(structure), str(tmp_path / "few.rr"), "-o", str(tmp_path / "o.csv")],
        standalone_mode=False,
    )  # fmt: skip
    assert result.exception is None, result.exception
    assert "have fewer pairs than asked for" in result.stderr
    assert "L           the residues of the whole sequence" in result.stdout
    rows = {(row["range"], row["cut"]): row for row in csv.DictReader((tmp_path / "o.csv").read_text().splitlines())}
    assert float(rows["long", "L/5"]["precision"]) == pytest.approx(1 / 12, abs=1e-6)
    assert float(rows["short", "L"]["precision"]) == 0
    assert (rows["long", "L"]["held"], rows["long", "L"]["count"]) == ("1", "60")


def test_another_construct_is_aligned(model, tmp_path):
    """The structure lacks three residues of the protein, and has a tag before it."""
    construct = "GSHM" + SEQUENCE[:30] + SEQUENCE[33:]
    place_of = {place: place + 4 if place < 30 else place + 1 for place in range(60) if not 30 <= place < 33}
    path = tmp_path / "x.pdb"
    atoms = {place_of[place]: at for place, at in fold().items() if place in place_of}
    atoms |= {place: (500.0 + 10 * place, 0, 0) for place in range(4)}
    path.write_text(pdb_text([Part("B", construct, range(61), coordinates=atoms)]))
    maps = longlens.contacts({"mine": SEQUENCE}, model=model, threshold=0.0)
    with pytest.raises(InputError, match="give the protein with --fasta"):
        longlens.evaluate_contacts(maps, path)
    (tmp_path / "p.fasta").write_text(f">mine\n{SEQUENCE}\n")
    found = longlens.evaluate_contacts(maps, path, fasta=tmp_path / "p.fasta")
    matrix = maps.matrix(0)
    near = {(i, j) for i in place_of for j in place_of
            if i < j and np.linalg.norm(np.subtract(fold()[i], fold()[j])) < 8}  # fmt: skip
    # separations are those in the structure's sequence
    pairs = [(i, j) for i in place_of for j in place_of if place_of[j] - place_of[i] >= 24]
    ranked = sorted((pair for pair in pairs if pair[1] - pair[0] >= 6), key=lambda pair: -matrix[pair])[: 61 // 5]
    (row,) = (row for row in found.rows if (row["range"], row["cut"]) == ("long", "L/5"))
    assert row["precision"] == pytest.approx(sum(pair in near for pair in ranked) / (61 // 5))


def test_predictions_find_their_chains(model, tmp_path):
    other = protein(40, 5).replace("X", "A").replace("B", "N").replace("Z", "Q")
    parts = [Part("A", other, range(40), coordinates=fold(1)), Part("B", SEQUENCE, RESOLVED, coordinates=fold())]
    (tmp_path / "2xyz.cif").write_text(cif_text(parts))
    # by the residues, whatever the ids, and without the third
    proteins = {"first": SEQUENCE, "second": other, "third": protein(30, 9)}
    maps = longlens.contacts(proteins, model=model, threshold=0.0)
    found = longlens.evaluate_contacts(maps, [tmp_path / "2xyz.cif"])
    assert {(row["id"], row["chain"]) for row in found.rows} == {("first", "B"), ("second", "A")}
    assert found.unmatched == ["third"]
    # by the name of the chain
    i, j = np.triu_indices(60, 6)
    write_rr(tmp_path / "a.rr", i, j, np.linspace(0, 1, len(i)), {"id": "2xyz_B"})
    assert {row["chain"] for row in longlens.evaluate_contacts(tmp_path / "a.rr", tmp_path / "2xyz.cif").rows} == {"B"}
    summary = found.summary
    assert {row["proteins"] for row in summary} <= {1, 2}
    longs = [row["precision"] for row in found.rows if (row["range"], row["cut"]) == ("long", "L")]
    (mean,) = (row["precision"] for row in summary if (row["range"], row["cut"]) == ("long", "L"))
    assert mean == pytest.approx(np.mean(longs))


def test_rr_files_are_casps(model, tmp_path):
    maps = longlens.contacts(
        {"my protein": SEQUENCE, "b": "MKT"}, model=model, format="rr", threshold=0.2, output=tmp_path / "o"
    )
    lines = (tmp_path / "o" / "0000001.rr").read_text().splitlines()
    assert lines[:5] == ["PFRMAT RR", "TARGET my_protein", "AUTHOR longlens", f"METHOD {maps.model}", "MODEL 1"]
    assert lines[-1] == "END"
    with torch.no_grad():
        matrix = model.predict_contacts([SEQUENCE])[0].numpy()
    pairs = [line.split(" ") for line in lines[5:-1]]
    assert all((least, most) == ("0", "8") and int(i) < int(j) for i, j, least, most, _ in pairs)
    assert {(int(i), int(j)) for i, j, *_ in pairs} == {
        (i + 1, j + 1) for i in range(60) for j in range(i + 6, 60) if matrix[i, j] >= 0.2
    }
    probabilities = [float(pair[-1]) for pair in pairs]
    assert probabilities == sorted(probabilities, reverse=True)
    for i, j, *_, p in pairs:
        assert float(p) == pytest.approx(matrix[int(i) - 1, int(j) - 1], abs=1e-5)
    assert "\t" not in "".join(lines)
    # a protein without any pair, and the same pairs as an object
    assert len(maps[1]["i"]) == 0
    assert [row["pairs"] for row in maps.table] == [len(pairs), 0]
    # each pair once, also from both sides
    longlens.contacts(SEQUENCE, model=model, format="rr", top=3, output=tmp_path / "top")
    held = read_rr(tmp_path / "top" / "0000001.rr")
    assert len(held.i) == len(set(zip(held.i.tolist(), held.j.tolist(), strict=True)))
    assert (held.i < held.j).all()


def test_rr_files_that_were_stopped_go_on_to_the_same_bytes(model, tmp_path, monkeypatch):
    proteins = {f"p{n}": protein(1500, n) for n in range(3)}
    more = {"model": model, "format": "rr", "threshold": 0.9}
    longlens.contacts(proteins, output=tmp_path / "whole", **more)
    commit = ResultFolder.commit

    def stopping(self, unit):
        commit(self, unit)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultFolder, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            longlens.contacts(proteins, output=tmp_path / "cut", **more)
    longlens.contacts(proteins, output=tmp_path / "cut", **more)
    names = [f"000000{n}.rr" for n in (1, 2, 3)]
    assert [(tmp_path / "cut" / n).read_bytes() for n in names] == [
        (tmp_path / "whole" / n).read_bytes() for n in names
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PFRMAT TS\n", "line 1: expected PFRMAT RR, got PFRMAT TS"),
        ("", "expected pairs in CASP's format RR, found none"),
        ("PFRMAT RR\n5 3 0 8 0.5\n", "line 2: expected a pair"),
        ("PFRMAT RR\n0 3 0 8 0.5\n", "line 2: expected a pair"),
        ("PFRMAT RR\n1 9 0 8 1.5\n", "line 2: expected a pair"),
        ("PFRMAT RR\n1 9 0.5\n", "line 2: expected a pair"),
        ("PFRMAT RR\n1 9 0 8 high\n", "line 2: expected a pair"),
        ("PFRMAT RR\nTARGET 1abc\n1 61 0 8 0.5\n", r"expected residues in 1..60, got 61 in the pairs of 1abc"),
    ],
)
def test_broken_predictions_are_named(text, message, structure, tmp_path):
    (tmp_path / "x.rr").write_text(text)
    result = CliRunner().invoke(
        cli, ["contacts", "evaluate", str(tmp_path / "x.rr"), str(structure)], standalone_mode=False
    )
    assert isinstance(result.exception, InputError), result.exception
    assert message in str(result.exception)


def test_what_cannot_be_compared_is_refused(model, structure, tmp_path):
    two = longlens.contacts({"x": protein(30, 1), "y": protein(30, 2)}, model=model, threshold=0.0)
    with pytest.raises(
        InputError, match=r"expected a structure of x, y, got 1abc\.cif A; a chain has the same residues"
    ):
        longlens.evaluate_contacts(two, structure)
    with pytest.raises(InputError, match="expected length of full, resolved, got 'half'"):
        longlens.evaluate_contacts(two, structure, length="half")
    with pytest.raises(InputError, match="got 2 and 0 chains"):
        longlens.evaluate_contacts(two, [])
    (tmp_path / "p.fasta").write_text(">x\n" + "W" * 30 + "\n")
    (tmp_path / "x.rr").write_text("PFRMAT RR\nTARGET x\n1 9 0 8 0.5\n")
    with pytest.raises(InputError, match="expected the protein x, got an identity of"):
        longlens.evaluate_contacts(tmp_path / "x.rr", structure, fasta=tmp_path / "p.fasta")
    embeddings = longlens.embed("MKT", model=model, output=tmp_path / "embedded")
    with pytest.raises(InputError, match="those of another command"):
        longlens.evaluate_contacts(embeddings.folder, structure)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"or files \.rr, found none"):
        longlens.evaluate_contacts(tmp_path / "empty", structure)
    with pytest.raises(InputError, match="expected a folder of longlens contacts or a file"):
        longlens.evaluate_contacts(tmp_path / "p.fasta", structure)


def test_structures_without_contacts_are_left_out_and_said(model, structure, tmp_path):
    far = tmp_path / "2def.cif"
    other, line = "ACDEFGHIKLMNPQRSTVWY", {place: (9.0 * place, 0.0, 0.0) for place in range(20)}
    far.write_text(cif_text([Part("A", other, range(20), coordinates=line)]))
    both = longlens.contacts({"x": SEQUENCE, "y": other}, model=model, threshold=0.0, output=tmp_path / "maps")
    found = longlens.evaluate_contacts(both, [structure, far])
    assert (found.without_contacts, {row["id"] for row in found.rows}) == (["y"], {"x"})
    result = CliRunner().invoke(cli, ["contacts", "evaluate", str(both.folder), str(structure), str(far)])
    assert "1 proteins, such as y, have no contacts in their structure and are left out" in result.stderr
    alone = longlens.contacts({"y": other}, model=model, threshold=0.0)
    with pytest.raises(InputError, match="expected contacts in the structures of y, found none: no two"):
        longlens.evaluate_contacts(alone, far)
