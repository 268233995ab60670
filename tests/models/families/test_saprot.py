"""SaProt: tokens of residue and structure, parity with transformers, structures, and scores summed over structures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import EsmConfig, EsmForMaskedLM

import longlens
from family_peer import PROTEINS, differences, load_float64, of_transformers, randomise
from longlens.cli.main import cli
from longlens.errors import CheckpointError, InputError, SequenceError
from longlens.io.structure_alphabet import LETTERS, RESIDUES
from longlens.io.structure_letters import read_structure_letters
from longlens.models.families.saprot import TOKENS
from longlens.models.pretrained import load

TEXT, STRUCTURE = "MKTAYIAKQRQISFVKSHFS", "dvpq#vlvcsnnaacdegkt"


def peer() -> EsmForMaskedLM:
    config = EsmConfig(
        vocab_size=446, mask_token_id=4, pad_token_id=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, layer_norm_eps=1e-5, token_dropout=True, position_embedding_type="rotary",
        emb_layer_norm_before=False, max_position_embeddings=1026,
    )  # fmt: skip
    model = EsmForMaskedLM(config).eval()
    randomise(model)
    return model


def write(folder):
    model = peer()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    return of_transformers(model.double())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saprot")
    write(path)
    return path


def test_tokens_are_those_of_the_vocabulary(folder):
    ours = load(folder)
    assert len(TOKENS) == 446
    assert TOKENS[5] == "Ap"
    assert TOKENS[-1] == "##"
    plain = ours.pack(TEXT).tokens
    assert [TOKENS[token] for token in plain[1:4]] == ["M#", "K#", "T#"]
    structured = ours.with_alphabet(ours.alphabet.with_structures({TEXT: STRUCTURE}))
    told = structured.pack(TEXT).tokens
    assert "".join(TOKENS[token] for token in told[1:-1]) == "".join(map("".join, zip(TEXT, STRUCTURE, strict=True)))
    assert told[[0, -1]].tolist() == [0, 2]
    assert torch.equal(ours.pack(TEXT).tokens, plain)
    assert TOKENS[ours.pack("MX").tokens[2]] == "##"
    # in the order of the vocabulary, which the authors' tokeniser reads from the file
    assert all(TOKENS[5 + 21 * a + s] == f"{r}{t}" for a, r in enumerate(RESIDUES) for s, t in enumerate(LETTERS))


def test_every_layer_equals_transformers(folder, tmp_path):
    states = write(tmp_path)
    ours = load_float64(tmp_path)
    structured = ours.with_alphabet(ours.alphabet.with_structures({TEXT: STRUCTURE}))
    for model, proteins in ((ours, PROTEINS), (structured, [TEXT])):
        # transformers rotates ESM's queries and keys in float32, also in a model of float64
        assert max(differences(model, model.pack(proteins), states)) < 1e-6
    single = load(tmp_path, dtype="float32")
    assert max(differences(single, single.pack(PROTEINS), states)) < 1e-5


def test_a_score_sums_over_structures_and_hides_the_residue_alone(folder):
    theirs = EsmForMaskedLM.from_pretrained(folder).eval()
    tokens = [TOKENS.index(a + s) for a, s in zip(TEXT, STRUCTURE, strict=True)]
    place = 7
    hidden = [0, *tokens, 2]
    hidden[place + 1] = TOKENS.index("#" + STRUCTURE[place])
    with torch.no_grad():
        p = theirs(torch.tensor([hidden])).logits[0, place + 1].double().softmax(-1)
    of = {a: float(p[TOKENS.index(a + LETTERS[0]) :][:21].sum()) for a in RESIDUES}
    scored = longlens.score(TEXT, ["K8W"], model=folder, structures={TEXT: STRUCTURE}, dtype="float32")
    assert scored.scores[0] == pytest.approx(np.log(of["W"] / of["K"]), abs=1e-4)
    assert scored.manifest["model"]["reading"]["structures"]
    matrix = longlens.score(TEXT, model=folder, structures={TEXT: STRUCTURE}, dtype="float32")
    assert matrix["K8W"] == pytest.approx(scored.scores[0], abs=1e-5)
    without = longlens.score(TEXT, ["K8W"], model=folder, dtype="float32")
    assert abs(without.scores[0] - scored.scores[0]) > 1e-3
    with pytest.raises(SequenceError, match="a variant has no structure of its own"):
        longlens.score(TEXT, ["K8W"], model=folder, structures={TEXT: STRUCTURE}, scoring_strategy="pseudo-ppl")


def helix(path, text, chain="A", plddt=None, turn=100.0):
    """A backbone of ideal helical geometry, with C-beta atoms; `turn` degrees to a residue."""
    from Bio.Data.IUPACData import protein_letters_1to3 as names

    lines, number = [], 1
    for place, residue in enumerate(text):
        angle = np.deg2rad(turn) * place
        for atom, radius, ahead, rise in (
            ("N", 1.55, -0.47, -0.9), ("CA", 2.28, 0.0, 0.0), ("C", 1.68, 0.46, 1.1), ("O", 2.0, 0.5, 2.3),
            ("CB", 3.3, -0.2, -0.5),
        ):  # fmt: skip
            if atom == "CB" and residue == "G":
                continue
            x, y, z = radius * np.cos(angle + ahead), radius * np.sin(angle + ahead), 1.5 * place + rise
            value = 90.0 if plddt is None else plddt[place]
            lines.append(
                f"ATOM  {number:5d}  {atom:<3s} {names[residue].upper()} {chain}{place + 1:4d}    "
                f"{x:8.3f}{y:8.3f}{z:8.3f}{1.0:6.2f}{value:6.2f}           {atom[0]}"
            )
            number += 1
    path.write_text("\n".join([*lines, "END"]) + "\n")


def test_letters_of_a_structure_are_mini3dis(tmp_path):
    from Bio.PDB.PDBParser import PDBParser
    from mini3di import Encoder

    plddt = [50.0 if place in (4, 5) else 90.0 for place in range(len(TEXT))]
    helix(tmp_path / "a.pdb", TEXT, plddt=plddt)
    encoder = Encoder()
    chain = next(PDBParser(QUIET=True).get_structure("a", tmp_path / "a.pdb").get_chains())
    wanted = encoder.build_sequence(encoder.encode_chain(chain)).lower()
    assert set(wanted) <= set(LETTERS)
    assert read_structure_letters([tmp_path / "a.pdb"], {"x": TEXT}) == {TEXT: wanted}
    assert read_structure_letters([tmp_path], {"x": TEXT}) == {TEXT: wanted}
    unsure = read_structure_letters([tmp_path / "a.pdb"], {"x": TEXT}, min_plddt=70.0)
    assert unsure == {TEXT: f"{wanted[:4]}##{wanted[6:]}"}
    (tmp_path / "letters.fasta").write_text(f">x\n{wanted.upper()}\n>other\nAAA\n")
    assert read_structure_letters([tmp_path / "letters.fasta"], {"x": TEXT}) == {TEXT: wanted}


def test_two_structures_of_one_sequence_are_not_mixed_up(tmp_path):
    first, second = "d" * 20, "p" * 20
    (tmp_path / "letters.fasta").write_text(f">x\n{first}\n>y\n{second}\n")
    with pytest.raises(InputError, match=r"x and y: expected one structure of proteins that have the same sequence"):
        read_structure_letters([tmp_path / "letters.fasta"], {"x": TEXT, "y": TEXT})
    assert read_structure_letters([tmp_path / "letters.fasta"], {"y": TEXT}) == {TEXT: second}
    # two conformations, in two files and in two chains of one
    folder = tmp_path / "structures"
    folder.mkdir()
    helix(folder / "1abc.pdb", TEXT)
    helix(folder / "2abc.pdb", TEXT, turn=60.0)
    one, other = (read_structure_letters([folder / f"{name}.pdb"], {"x": TEXT})[TEXT] for name in ("1abc", "2abc"))
    assert one != other
    with pytest.raises(
        InputError, match=r"x: expected one structure, got .*1abc\.pdb, chain A and .*2abc\.pdb, chain A"
    ):
        read_structure_letters([folder], {"x": TEXT})
    assert read_structure_letters([folder], {"2abc": TEXT}) == {TEXT: other}
    helix(folder / "3abc.pdb", TEXT, chain="B", turn=60.0)
    both = "".join((folder / f"{name}.pdb").read_text().replace("END\n", "TER\n") for name in ("1abc", "3abc"))
    (tmp_path / "4abc.pdb").write_text(both)
    assert read_structure_letters([tmp_path / "4abc.pdb"], {"4abc_B": TEXT}) == {TEXT: other}
    with pytest.raises(InputError, match=r"4abc\.pdb, chain A and .*4abc\.pdb, chain B, whose letters differ"):
        read_structure_letters([tmp_path / "4abc.pdb"], {"4abc": TEXT})


def test_residues_without_atoms_have_unknown_letters(tmp_path):
    from Bio.Data.IUPACData import protein_letters_1to3 as names

    helix(tmp_path / "a.pdb", TEXT)
    (letters,) = read_structure_letters([tmp_path / "a.pdb"], {"x": TEXT}).values()
    whole = f"GS{TEXT}W"
    words = [names[residue].upper() for residue in whole]
    seqres = [f"SEQRES {row + 1:3d} A {len(words):4d}  {' '.join(words[13 * row :][:13])}\n" for row in range(2)]
    (tmp_path / "a.pdb").write_text("".join(seqres) + (tmp_path / "a.pdb").read_text())
    assert read_structure_letters([tmp_path / "a.pdb"], {"x": whole, "y": TEXT}) == {
        whole: f"##{letters}#", TEXT: letters,
    }  # fmt: skip


def test_structures_on_the_command_line(folder, tmp_path):
    (tmp_path / "p.fasta").write_text(f">x\n{TEXT}\n")
    helix(tmp_path / "x.pdb", TEXT)
    for number, more in enumerate(([], ["--structures", str(tmp_path / "x.pdb")])):
        result = CliRunner().invoke(cli, [
            "embed", str(tmp_path / "p.fasta"), "-o", str(tmp_path / f"{number}"), "--model", str(folder), *more,
        ])  # fmt: skip
        assert result.exit_code == 0, result.output
    without, told = (longlens.open_results(tmp_path / name)["mean/2"][0] for name in "01")
    assert np.abs(without - told).max() > 1e-3
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert manifest["job"]["model"]["reading"] == manifest["model"]["reading"]
    # the same folder without the structures is another job
    again = CliRunner().invoke(cli, [
        "embed", str(tmp_path / "p.fasta"), "-o", str(tmp_path / "1"), "--model", str(folder),
    ], standalone_mode=False)  # fmt: skip
    assert isinstance(again.exception, InputError)


def test_what_cannot_be_read_is_refused(folder, tmp_path):
    model = load(folder)
    for structures, message in (
        ({TEXT: "ddd"}, "a structure letter for each residue, got 3 letters for 20"),
        ({TEXT: "x" * 20}, "structure letters of .*, got x"),
        (tmp_path / "none.pdb", "expected structures, a folder or a FASTA file of letters, found no"),
        (tmp_path / "letters.fasta", "expected 20 structure letters, got 3"),
        (tmp_path / "empty.fasta", "expected a structure of each protein, found none of x"),
        (tmp_path / "broken.pdb", r"broken\.pdb: expected a protein, found no residue"),
        (tmp_path / "broken.cif", r"broken\.cif: expected a structure in PDB or mmCIF format"),
        ({TEXT: "d" * 20, TEXT.lower(): "p" * 20}, "expected one structure of each sequence, got two"),
    ):
        (tmp_path / "letters.fasta").write_text(">x\nddd\n")
        (tmp_path / "empty.fasta").write_text(">y\nddd\n")
        (tmp_path / "broken.pdb").write_text("")
        (tmp_path / "broken.cif").write_text("")
        with pytest.raises(InputError, match=message):
            longlens.embed({"x": TEXT}, model=model, structures=structures)
    with pytest.raises(InputError, match="a model that reads structures, such as SaProt, got tiny"):
        longlens.embed({"x": TEXT}, structures={TEXT: STRUCTURE})
    with pytest.raises(InputError, match="--min-plddt only with --structures"):
        longlens.embed({"x": TEXT}, model=model, min_plddt=70.0)
    (folder / "vocab.txt").write_text("\n".join([*TOKENS[:-1], "#?"]))
    with pytest.raises(CheckpointError, match=r"expected SaProt's 446 tokens, got 446, with '#\?' for '##'"):
        load(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
