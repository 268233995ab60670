"""Numbers on structures, read back by Biopython: aligned by the whole sequence, in a new file, mismatches named."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from Bio.PDB.MMCIF2Dict import MMCIF2Dict
from Bio.PDB.MMCIFParser import MMCIFParser
from click.testing import CliRunner

import longlens
from esm_peer import esm, protein, save
from longlens.cli.main import cli
from longlens.errors import InputError
from longlens.io.alignment import aligned_pairs, identity
from longlens.io.alphabet import STANDARD
from longlens.io.chains import read_chains
from longlens.models.pretrained import load
from written_structures import Part, cif_text, pdb_text

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDG"
# a loop and both ends have no atoms
RESOLVED = [place for place in range(2, 41) if not 10 <= place < 16]
OTHER = "GAVLIWCHDE"
VALUES = np.arange(len(SEQUENCE)) / 7 + 0.125


@pytest.fixture
def structure(tmp_path):
    parts = [Part("A", SEQUENCE, RESOLVED, first=101), Part("B", SEQUENCE, RESOLVED[:-3], first=-4, modified=[0]),
             Part("L", OTHER, range(10))]  # fmt: skip
    path = tmp_path / "s.cif"
    path.write_text(cif_text(parts, models=2))
    return path


def by_biopython(path):
    """{(model, chain, authors' number): B-factors of the residue's atoms}, water apart."""
    structure = MMCIFParser(QUIET=True, auth_residues=True).get_structure("x", path)
    return {
        (model.id, chain.id, residue.id[1]): {atom.bfactor for atom in residue}
        for model in structure for chain in model for residue in chain if residue.get_resname() != "HOH"
    }  # fmt: skip


def test_values_are_in_the_b_factors_of_the_right_residues(structure, tmp_path):
    before = structure.read_bytes()
    painting = longlens.paint(structure, VALUES, tmp_path / "out.cif", sequence=SEQUENCE, missing=-1)
    assert structure.read_bytes() == before
    found = by_biopython(tmp_path / "out.cif")
    for model in (0, 1):
        for chain, first, resolved in (("A", 101, RESOLVED), ("B", -4, RESOLVED[:-3])):
            for place in resolved:
                (value,) = found[model, chain, first + place]
                assert value == pytest.approx(VALUES[place], abs=1e-4)
    # another molecule and water have the number for atoms without one
    assert {value for (_, chain, _), values in found.items() for value in values if chain == "L"} == {-1.0}
    items = MMCIF2Dict(tmp_path / "out.cif")
    water = [place for place, name in enumerate(items["_atom_site.label_comp_id"]) if name == "HOH"]
    assert {items["_atom_site.B_iso_or_equiv"][place] for place in water} == {"-1.0000"}
    # nothing else has changed
    old = MMCIF2Dict(structure)
    del items["_atom_site.B_iso_or_equiv"], old["_atom_site.B_iso_or_equiv"]
    assert items == old
    first, second = painting.chains
    assert (first.id, first.painted, first.bare, first.unresolved) == ("A", len(RESOLVED), 0, 10)
    assert (second.id, second.painted, second.unresolved, second.mismatches) == ("B", len(RESOLVED) - 3, 13, [])


def test_residues_are_placed_by_label_seq_id_and_not_by_their_order(structure, tmp_path):
    """Without the loop's residues, counting atoms would shift every value behind it."""
    (chain, *_) = read_chains(structure)
    assert (chain.sequence, chain.whole) == (SEQUENCE, True)
    assert [residue.place for residue in chain.residues] == RESOLVED


def test_chimerax_gets_an_attribute_by_chain_and_number(structure, tmp_path):
    values = VALUES.copy()
    values[3] = np.nan
    longlens.paint(structure, values, tmp_path / "out.defattr", sequence=SEQUENCE, chain="A", column="entropy")
    lines = (tmp_path / "out.defattr").read_text().splitlines()
    assert lines[:3] == ["attribute: entropy", "match mode: any", "recipient: residues"]
    assert lines[3:] == [f"\t/A:{101 + place}\t{VALUES[place]:.6g}" for place in RESOLVED if place != 3]


def test_insertion_codes_are_part_of_a_number(tmp_path):
    path = tmp_path / "s.cif"
    # two residues after number 5 are 5A and 5B
    path.write_text(cif_text([Part("H", SEQUENCE, range(43))], insertions=[5, 6]))
    longlens.paint(path, VALUES, tmp_path / "o.defattr", sequence=SEQUENCE)
    lines = (tmp_path / "o.defattr").read_text().splitlines()[3:]
    assert [line.split("\t")[1] for line in lines[:9]] == [
        "/H:1", "/H:2", "/H:3", "/H:4", "/H:5", "/H:5A", "/H:5B", "/H:6", "/H:7",
    ]  # fmt: skip
    longlens.paint(path, VALUES, tmp_path / "o.cif", sequence=SEQUENCE)
    table = MMCIF2Dict(tmp_path / "o.cif")
    columns = (table[f"_atom_site.{name}"] for name in ("label_seq_id", "B_iso_or_equiv"))
    got = {int(label): float(value) for label, value in zip(*columns, strict=True) if label != "."}
    assert got == pytest.approx({place + 1: value for place, value in enumerate(VALUES)}, abs=1e-4)


def test_mismatches_and_deletions_are_reported_by_position(tmp_path):
    # the construct has a tag, lacks three residues and has one mutation
    construct = "GSHM" + SEQUENCE[1:20] + SEQUENCE[23:30] + "W" + SEQUENCE[31:]
    path = tmp_path / "s.cif"
    path.write_text(cif_text([Part("A", construct, range(len(construct)))]))
    painting = longlens.paint(path, VALUES, tmp_path / "o.cif", sequence=SEQUENCE, missing=9)
    (chain,) = painting.chains
    assert [str(one) for one in chain.mismatches] == [
        f"residue 31 is {SEQUENCE[30]} in the protein and W in the structure"
    ]
    found = {number: value for (_, _, number), (value,) in by_biopython(tmp_path / "o.cif").items()}
    # after the gap the values are those of the right residues again
    for place, number in ((5, 9), (19, 23), (23, 24), (30, 31), (42, 43)):
        assert found[number] == pytest.approx(VALUES[place], abs=1e-4), place
    assert found[1] == 9
    assert chain.bare == 3


@pytest.mark.parametrize("seqres", [True, False])
def test_a_pdb_file_is_converted(seqres, tmp_path):
    path = tmp_path / "s.pdb"
    modified = [place for place in RESOLVED if SEQUENCE[place] == "M"]
    path.write_text(pdb_text([Part("A", SEQUENCE, RESOLVED, first=11, modified=modified)], seqres=seqres))
    (chain,) = read_chains(path)
    assert chain.whole == seqres
    assert chain.sequence == (SEQUENCE if seqres else "".join(SEQUENCE[place] for place in RESOLVED))
    longlens.paint(path, VALUES, tmp_path / "o.cif", sequence=SEQUENCE)
    found = by_biopython(tmp_path / "o.cif")
    for place in RESOLVED:
        assert sorted(found[0, "A", 11 + place]) == pytest.approx([VALUES[place]], abs=1e-4)


def test_a_selenomethionine_is_a_methionine(tmp_path):
    for name, text in (("s.cif", cif_text), ("s.pdb", pdb_text)):
        path = tmp_path / name
        path.write_text(text([Part("A", "GAVMLIKR", range(8), modified=[3])]))
        (chain,) = read_chains(path)
        assert chain.sequence == "GAVMLIKR"
        assert len(chain.residues) == 8


def test_numbers_that_jump_are_placed_by_alignment(tmp_path):
    """The authors' numbers fit no constant step, so that the resolved residues are aligned with SEQRES."""
    text = pdb_text([Part("A", SEQUENCE, RESOLVED)])
    lines = []
    for line in text.splitlines():
        jump = line.startswith("ATOM") and int(line[22:26]) > 20
        lines.append(f"{line[:22]}{int(line[22:26]) + 100:4d}{line[26:]}" if jump else line)
    path = tmp_path / "s.pdb"
    path.write_text("\n".join(lines) + "\n")
    (chain,) = read_chains(path)
    assert [residue.place for residue in chain.residues] == RESOLVED


def test_results_of_longlens_are_painted(structure, tmp_path):
    model = load(save(esm(2, 32, 4), tmp_path / "model"))
    fasta = tmp_path / "p.fasta"
    fasta.write_text(f">other\n{protein(12, 1)}\n>mine\n{SEQUENCE}\n")
    out = longlens.embed(fasta, model=model, include="surprise", output=tmp_path / "embedded")
    surprise = out.residues("surprise", "mine")
    result = CliRunner().invoke(
        cli,
        ["paint", str(structure), "--values", str(out.folder), "-o", str(tmp_path / "o.cif")],
        standalone_mode=False,
    )
    assert result.exception is None, result.exception
    assert "chain A     33 residues painted, 0 without a number, 10 without atoms, 0 mismatches" in result.stdout
    found = by_biopython(tmp_path / "o.cif")
    for place in RESOLVED:
        assert sorted(found[0, "A", 101 + place]) == pytest.approx([float(surprise[place])], abs=1e-4)
    # the look at the same protein, and the table of all its substitutions
    looks = longlens.look({"mine": SEQUENCE}, model=model, figures=False, output=tmp_path / "looked")
    longlens.paint(structure, looks, tmp_path / "l.defattr", column="received")
    received = looks["mine"]["tokens"]["received"][1:-1]
    assert f"\t/A:103\t{received[2]:.6g}" in (tmp_path / "l.defattr").read_text()
    every = longlens.score(SEQUENCE, model=model, output=tmp_path / "all.csv")
    longlens.paint(structure, tmp_path / "all.csv", tmp_path / "m.defattr", column="mean", attribute="tolerance")
    text = (tmp_path / "m.defattr").read_text()
    assert text.startswith("attribute: tolerance\n")
    value = float(text.split("/A:103\t")[1].split("\n")[0])
    assert value == pytest.approx(every.matrix[2].sum() / 19, abs=1e-4)
    # a chain that differs from the protein needs the FASTA file
    cut = tmp_path / "cut.cif"
    cut.write_text(cif_text([Part("A", SEQUENCE[5:], range(30))]))
    with pytest.raises(InputError, match="give its FASTA file with --fasta"):
        longlens.paint(cut, out, tmp_path / "c.cif", protein="mine")
    longlens.paint(cut, out, tmp_path / "c.cif", protein="mine", fasta=fasta)
    assert sorted(by_biopython(tmp_path / "c.cif")[0, "A", 1]) == pytest.approx([float(surprise[5])], abs=1e-4)


def test_of_several_proteins_the_one_of_the_chain_is_painted(structure, tmp_path):
    model = load(save(esm(2, 32, 4), tmp_path / "model"))
    proteins = {"other": protein(12, 1), "mine": SEQUENCE, "third": protein(30, 2)}
    looks = longlens.look(proteins, model=model, figures=False, output=tmp_path / "looked")
    longlens.paint(structure, looks, tmp_path / "l.defattr", column="received")
    assert f"\t/A:103\t{looks['mine']['tokens']['received'][3]:.6g}" in (tmp_path / "l.defattr").read_text()
    # a table of residues with their proteins' ids
    rows = [f"{name},{residue},{place}" for name, text in proteins.items() for place, residue in enumerate(text)]
    (tmp_path / "t.csv").write_text("\n".join(["id,residue,number", *rows]) + "\n")
    longlens.paint(structure, tmp_path / "t.csv", tmp_path / "t.defattr", column="number")
    assert "\t/A:103\t2\n" in (tmp_path / "t.defattr").read_text()
    # a column of that name is no target of context
    rows = "".join(f"{residue},{place},{place}\n" for place, residue in enumerate(SEQUENCE))
    (tmp_path / "u.csv").write_text(f"residue,target,number\n{rows}")
    longlens.paint(structure, tmp_path / "u.csv", tmp_path / "u.defattr", column="number")
    assert "\t/A:103\t2\n" in (tmp_path / "u.defattr").read_text()
    with pytest.raises(InputError, match="found 0 of 3; name the one that is meant with --protein"):
        longlens.paint(_cut(tmp_path), looks, tmp_path / "c.cif", column="received")


def test_what_carried_one_target_is_painted(structure, tmp_path):
    model = load(save(esm(2, 32, 4), tmp_path / "model"))
    options = {"model": model, "spans": 8, "exact": 1, "figures": False}
    found = longlens.context(
        {"other": protein(12, 1), "mine": SEQUENCE}, targets="5", output=tmp_path / "one", **options
    )
    longlens.paint(structure, found, tmp_path / "c.defattr", column="estimate")
    assert f"\t/A:103\t{found['mine']['keys']['estimate'][3]:.6g}" in (tmp_path / "c.defattr").read_text()
    two = longlens.context({"mine": SEQUENCE}, targets="5,9", output=tmp_path / "two", **options)
    with pytest.raises(InputError, match="the effects on one target, got those on 2"):
        longlens.paint(structure, two, tmp_path / "d.defattr", column="estimate")


def _cut(folder):
    path = folder / "cut.cif"
    path.write_text(cif_text([Part("A", SEQUENCE[5:], range(30))]))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--values", "v.csv", "--column", "gone", "-o", "o.cif"],
            "expected a column 'gone', found wild_type, surprise",
        ),
        (["--values", "letters.csv", "-o", "o.cif"], "expected a column of residues"),
        (["--values", "words.csv", "-o", "o.cif"], "expected numbers in column 'surprise'"),
        (["--values", "other.csv", "-o", "o.cif"], "got identities of A "),
        (["--values", "v.csv", "-o", "o.pdb"], "expected an output that ends in .cif or .defattr"),
        (["--values", "v.csv", "-o", "s.cif"], "expected another file than the structure"),
        (["--values", "v.csv", "-o", "none/o.cif"], "a file in a folder that exists"),
        (["--values", "v.csv", "-o", "o.defattr", "--attribute", "My attribute"], "expected the name of an attribute"),
        (["--values", "v.csv", "-o", "o.cif", "--chain", "Q"], "expected protein chains of A, B, L, got Q"),
        (["--values", "v.csv", "-o", "o.cif", "--chain", "L"], "got identities of L "),
        (["--values", "empty", "-o", "o.cif"], "found no manifest.json"),
        (
            ["--values", "broken.parquet", "-o", "o.cif"],
            "broken.parquet: expected a table in Parquet, it cannot be read",
        ),
        (["--values", "v.csv", "-o", "o.cif", "--missing", "nan"], "expected a finite number"),
        (["--values", "v.csv", "-o", "o.cif", "--attribute", "tolerance"], "only with an output in .defattr"),
        (["--values", "v.csv", "-o", "o.defattr", "--missing", "1"], "only with an output in .cif"),
        (["--values", "v.csv", "-o", "o.cif", "--fasta", "none.fasta"], "none.fasta: expected a FASTA file"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(arguments, message, structure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    rows = "".join(f"{letter},1.5\n" for letter in SEQUENCE)
    (tmp_path / "v.csv").write_text(f"wild_type,surprise\n{rows}")
    (tmp_path / "letters.csv").write_text("position,surprise\n1,0.5\n")
    (tmp_path / "words.csv").write_text("residue,surprise\nM,high\n")
    (tmp_path / "other.csv").write_text("residue,surprise\n" + "".join(f"{x},1\n" for x in "WWCCHHWWCCPPWWHHCCWW"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    before = structure.read_bytes()
    result = CliRunner().invoke(cli, ["paint", "s.cif", *arguments], standalone_mode=False)
    assert isinstance(result.exception, InputError), result.exception
    assert message in str(result.exception)
    assert structure.read_bytes() == before
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.parametrize(("name", "text", "message"), [
    ("x.cif", "data_x\n", "expected a structure in PDB or mmCIF"),
    ("x.cif", "", "expected a structure in PDB or mmCIF"),
    ("x.pdb", "nothing\n", "found no residue with a C-alpha"),
    ("x.pdb", "ATOM      1  CA  ALA A   1      wrong\n", "expected a structure in PDB or mmCIF"),
])  # fmt: skip
def test_broken_structures_are_named(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        longlens.paint(path, [1.0], tmp_path / "o.cif", sequence="M")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("column", "message"), [
    ({"surprise": [[1.0, 2.0]] * 8}, "expected numbers in column 'surprise'"),
    ({"surprise": [{"a": 1}] * 8}, "expected numbers in column 'surprise'"),
    ({"surprise": [None] * 8}, "expected numbers in column 'surprise', got none in 8 rows"),
    ({"surprise": [float("inf")] * 8}, "got none in 8 rows"),
    ({"surprise": [1.0] * 8, "residue": ["?"] * 8}, "expected"),
])  # fmt: skip
def test_columns_of_other_types_are_refused(column, message, tmp_path):
    (tmp_path / "s.cif").write_text(cif_text([Part("A", "GAVMLIKR", range(8))]))
    pq.write_table(pa.table({"residue": list("GAVMLIKR"), **column}), tmp_path / "v.parquet")
    with pytest.raises(InputError, match=message) as caught:
        longlens.paint(tmp_path / "s.cif", tmp_path / "v.parquet", tmp_path / "o.cif")
    assert str(tmp_path / "v.parquet") in str(caught.value)
    assert not (tmp_path / "o.cif").exists()


def test_small_letters_are_residues_and_large_numbers_are_read_back(tmp_path):
    (tmp_path / "s.cif").write_text(cif_text([Part("A", "GAVMLIKR", range(8))]))
    rows = "".join(f"{letter},{10.0 ** (40 * place)}\n" for place, letter in enumerate("gavmlikr"))
    (tmp_path / "v.csv").write_text(f"residue,surprise\n{rows}")
    longlens.paint(tmp_path / "s.cif", tmp_path / "v.csv", tmp_path / "o.cif")
    found = by_biopython(tmp_path / "o.cif")
    for place in range(8):
        assert sorted(found[0, "A", place + 1]) == pytest.approx([10.0 ** (40 * place)])


@pytest.mark.parametrize(("own", "other"), [("", "-1.5"), ("0", "-1.5")])
def test_the_mean_of_substitutions_leaves_out_the_residue_itself(own, other, tmp_path):
    (tmp_path / "s.cif").write_text(cif_text([Part("A", "GAVMLIKR", range(8))]))
    rows = [",".join([letter, *(own if x == letter else other for x in STANDARD)]) for letter in "GAVMLIKR"]
    rows[2] = rows[2].replace("-1.5", "", 1)
    (tmp_path / "v.csv").write_text("\n".join([f"wild_type,{','.join(STANDARD)}", *rows]) + "\n")
    painting = longlens.paint(tmp_path / "s.cif", tmp_path / "v.csv", tmp_path / "o.defattr", column="mean")
    lines = (tmp_path / "o.defattr").read_text().splitlines()[3:]
    # a residue of which a substitution is missing has no mean
    assert lines == [f"\t/A:{number}\t-1.5" for number in (1, 2, 4, 5, 6, 7, 8)]
    assert (painting.chains[0].painted, painting.chains[0].bare) == (7, 1)
    (tmp_path / "v.csv").write_text((tmp_path / "v.csv").read_text().replace("-1.5", "low", 1))
    with pytest.raises(InputError, match="expected numbers in column"):
        longlens.paint(tmp_path / "s.cif", tmp_path / "v.csv", tmp_path / "o.defattr", column="mean")


def test_a_table_of_look_without_residues_is_named(tmp_path):
    (tmp_path / "s.cif").write_text(cif_text([Part("A", SEQUENCE, RESOLVED)]))
    looks = longlens.look({"mine": SEQUENCE, "other": protein(12, 1)}, figures=False, output=tmp_path / "looked")
    pq.write_table(pa.table({"x": [1]}), looks.path("other") / "tokens.parquet")
    with pytest.raises(InputError, match=r"tokens\.parquet: expected a column of residues .*, found x"):
        longlens.paint(tmp_path / "s.cif", looks, tmp_path / "o.cif", column="received")


def test_numbers_need_a_sequence_of_their_length(structure, tmp_path):
    with pytest.raises(InputError, match="expected the sequence of the protein"):
        longlens.paint(structure, VALUES, tmp_path / "o.cif")
    with pytest.raises(InputError, match=r"one number for each of 3 residues, got numbers \(43,\)"):
        longlens.paint(structure, VALUES, tmp_path / "o.cif", sequence="MKT")


def test_alignments():
    assert aligned_pairs("MKTAYI", "TAY").tolist() == [[2, 0], [3, 1], [4, 2]]
    assert aligned_pairs("TAY", "MKTAYI").tolist() == [[0, 2], [1, 3], [2, 4]]
    pairs = aligned_pairs("MKTAYIAKQRQISFVK", "MKTAYIAQRQISFVK")
    assert len(pairs) == 15
    assert all("MKTAYIAKQRQISFVK"[i] == "MKTAYIAQRQISFVK"[j] for i, j in pairs.tolist())
    assert identity(aligned_pairs("WWWW", "MKTAYIAKQR"), "WWWW", "MKTAYIAKQR") < 0.3
    with pytest.raises(InputError, match="short enough to align"):
        aligned_pairs("A" * 40_000, "C" * 40_000)
