"""A fitted head finds the contacts it can see; features equal those of whole matrices; files and lists are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from contact_lists import contact_list
from esm_peer import esm, protein, save
from longlens.cli.main import cli
from longlens.errors import CheckpointError, InputError, SequenceError
from longlens.io.structures import ProteinContacts, read_pairs, read_structure
from longlens.jobs.fit_contacts import FitOptions, fit_head, load_head, pair_features, sample_pairs, save_head
from longlens.models.pretrained import load


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    theirs = esm(2, 64, 4)
    for layer in theirs.esm.encoder.layer:
        for part in (layer.attention.self.query, layer.attention.self.key):
            part.weight.data.normal_(0, 0.5)
    theirs.set_attn_implementation("eager")
    return theirs, load(save(theirs, tmp_path_factory.mktemp("model")))


def dense_features(theirs, ours, sequence):
    """(T, T, C) in float64, by the definition."""
    tokens = ours.pack([sequence]).tokens.unsqueeze(0)
    with torch.no_grad():
        weights = theirs.esm(tokens, attention_mask=torch.ones_like(tokens), output_attentions=True).attentions
    maps = torch.cat(weights, 1)[0, :, 1:-1, 1:-1].double()
    maps = maps + maps.mT
    corrected = maps - maps.sum(-1, keepdim=True) * maps.sum(-2, keepdim=True) / maps.sum((-1, -2), keepdim=True)
    return corrected.permute(1, 2, 0)


def test_features_equal_whole_matrices(pair):
    sequence = protein(60, 1)
    pairs = torch.randint(60, (200, 2))
    want = dense_features(*pair, sequence)[pairs[:, 0], pairs[:, 1]]
    torch.testing.assert_close(pair_features(pair[1], sequence, pairs).double(), want, rtol=1e-4, atol=1e-6)


def examples_of(pair, count=6):
    """Proteins whose contacts are where one channel's corrected attention is largest."""
    found = []
    for seed in range(count):
        sequence = protein(60, seed)
        channel = dense_features(*pair, sequence)[..., 5]
        i, j = np.triu_indices(60, 6)
        best = np.argsort(-channel[i, j].numpy())[:60]
        found.append(
            ProteinContacts(f"p{seed}", sequence, np.stack([i[best], j[best]], 1)[np.lexsort((j[best], i[best]))])
        )
    return found


def test_a_head_finds_the_channel_that_knows(pair, tmp_path):
    ours, examples = pair[1], examples_of(pair)
    fitted = fit_head(ours, examples, FitOptions(strength=1.0))
    weight = fitted.regression.weight.flatten()
    assert int(weight.argmax()) == 5
    assert fitted.contacts == 6 * 60
    assert fitted.held_out
    near, far = fitted.precision
    assert (near.separation, far.separation, near.proteins) == (6, 24, 6)
    assert 0.7 < near.lowest <= near.mean <= near.highest <= 1
    # 60 contacts of 55 * 54 / 2 pairs
    assert near.chance == pytest.approx(60 / 1485)
    # beyond the proteins fitted to
    unseen = examples_of(pair, 7)[-1]
    save_head(ours, fitted, tmp_path / "head.safetensors")
    other = load_copy(pair, tmp_path)
    load_head(other, tmp_path / "head.safetensors")
    found = other.predict_contacts([unseen.sequence])[0]
    i, j = np.triu_indices(60, 6)
    best = np.argsort(-found[i, j].numpy())[:60]
    chosen = set(zip(i[best].tolist(), j[best].tolist(), strict=True))
    hits = chosen & {tuple(pair) for pair in unseen.contacts.tolist()}
    assert len(hits) > 0.7 * 60


def load_copy(pair, folder):
    return load(save(pair[0], folder / "copy"))


def test_samples_stand_for_all_pairs():
    example = ProteinContacts("p", protein(50, 0), np.array([[0, 10], [3, 40], [5, 8]]))
    generator = np.random.default_rng(0)
    for negatives in (10, 400, 10**6):
        pairs, truth, weight = sample_pairs(example, FitOptions(negatives=negatives), generator)
        # pairs 6 apart: 44 + 43 + ... + 1
        assert weight.sum() == pytest.approx(44 * 45 / 2)
        assert truth.sum() == 2
        assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) == 2 + min(negatives, 988)
        assert ((pairs[:, 1] - pairs[:, 0]) >= 6).all()


PDB = """\
ATOM      1  N   ALA A   1      11.104   6.134  -6.504  1.00  0.00           N
ATOM      2  CA  ALA A   1       0.000   0.000   0.000  1.00  0.00           C
ATOM      3  CB  ALA A   1       0.000   0.000   1.500  1.00  0.00           C
ATOM      4  CA  GLY A   2       3.800   0.000   0.000  1.00  0.00           C
HETATM    5  CA  MSE A   3      30.000   0.000   0.000  1.00  0.00           C
ATOM      6  CA  TRP A   4       7.900   0.000   1.500  1.00  0.00           C
HETATM    7  O   HOH A   5       0.000   0.000   0.000  1.00  0.00           O
ATOM      8  CA  LYS B   1       0.000   0.000   0.000  1.00  0.00           C
END
"""


def test_structures_give_sequences_and_contacts(tmp_path):
    (tmp_path / "one.pdb").write_text(PDB)
    first, second = read_structure(tmp_path / "one.pdb")
    assert (first.id, first.sequence) == ("one_A", "AGMW")
    # C-beta of 1 to C-alpha of 2: 4.1; to 4: 7.9; 2 to 4: 4.4 Angstrom
    assert first.contacts.tolist() == [[0, 1], [0, 3], [1, 3]]
    assert second.sequence == "K"
    assert second.contacts.shape == (0, 2)


@pytest.mark.parametrize("text", ["", "hello\n", "HETATM    7  O   HOH A   5       0.000   0.000   0.000\n"])
def test_what_is_no_structure_is_said(tmp_path, text):
    (tmp_path / "x.pdb").write_text(text)
    with pytest.raises(InputError, match=r"x\.pdb: expected a"):
        list(read_structure(tmp_path / "x.pdb"))


def test_lists_of_contacts(tmp_path):
    (tmp_path / "p.fasta").write_text(">a\nMKTAYIAKQR\n>b\nGAVLI\n")
    path = tmp_path / "c.csv"
    path.write_text("id,i,j\na,9,1\na,1,9\na,2,8\n")
    (found,) = read_pairs([path], tmp_path / "p.fasta")
    assert found.contacts.tolist() == [[0, 8], [1, 7]]
    for text, kind, message in (
        ("id,i\na,1\n", InputError, "expected a column 'j', found id, i"),
        ("id,i,j\nc,1,2\n", InputError, "line 2: expected a protein"),
        ("id,i,j\na,1,x\n", InputError, "residue numbers"),
        ("id,i,j\na,1,11\n", SequenceError, r"1\.\.10"),
    ):
        path.write_text(text)
        with pytest.raises(kind, match=message):
            read_pairs([path], tmp_path / "p.fasta")


def test_the_command(pair, tmp_path):
    examples = examples_of(pair, 3)
    (tmp_path / "p.fasta").write_text("".join(f">{e.id}\n{e.sequence}\n" for e in examples))
    lines = [f"{e.id},{i + 1},{j + 1}" for e in examples for i, j in e.contacts]
    (tmp_path / "c.csv").write_text("\n".join(["id,i,j", *lines]) + "\n")
    model = save(pair[0], tmp_path / "model")
    args = [tmp_path / "c.csv", "--fasta", tmp_path / "p.fasta", "-o", tmp_path / "h" / "head.safetensors"]
    run = lambda *a: CliRunner().invoke(cli, ["contacts", *map(str, a)], standalone_mode=False)  # noqa: E731
    said = run("fit", *args, "--model", model, "--strength", 1)
    assert said.exception is None, said.exception
    assert "pairs       180 contacts" in said.output
    assert "of the L strongest pairs at least 6 apart; by chance 0.04" in said.output
    assert "of proteins held out" in said.output
    head = tmp_path / "h" / "head.safetensors"
    made = run(tmp_path / "p.fasta", "-o", tmp_path / "out", "--model", model, "--head", head)
    assert made.exception is None, made.exception
    assert (tmp_path / "out" / "index.parquet").is_file()
    refused = run(tmp_path / "p.fasta", "-o", tmp_path / "o2", "--model", "tiny", "--head", head)
    assert isinstance(refused.exception, CheckpointError)
    assert "(5, 4)" in str(refused.exception)
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="contacts fit"):
        load_head(load("tiny"), tmp_path / "no.safetensors")
    assert "--fasta" in str(run("fit", tmp_path / "c.csv", "-o", head).exception)
    assert "expected files of" in str(run("fit", tmp_path / "p.fasta", "-o", head).exception)


def test_nothing_in_contact_is_said(pair):
    with pytest.raises(InputError, match="expected pairs in contact"):
        fit_head(pair[1], [ProteinContacts("p", protein(40, 0), np.empty((0, 2), np.int64))], FitOptions())


def test_a_head_that_uses_nothing_is_refused(pair):
    with pytest.raises(InputError, match=r"every weight is 0 \(360 contacts of 6 proteins, strength 1e-09\)"):
        fit_head(pair[1], examples_of(pair), FitOptions(strength=1e-9))


def test_a_head_that_is_right_only_where_it_was_fitted_is_refused(pair):
    # contacts that are drawn at random: whatever fits them is no knowledge
    generator = np.random.default_rng(0)
    i, j = np.triu_indices(60, 6)
    examples = []
    for seed in range(3):
        chosen = np.sort(generator.permutation(len(i))[:12])
        examples.append(ProteinContacts(f"p{seed}", protein(60, seed), np.stack([i[chosen], j[chosen]], 1)))
    in_sample = fit_head(pair[1], examples[:1], FitOptions(strength=1e4))
    assert not in_sample.held_out
    assert in_sample.precision[0].mean > in_sample.precision[0].chance
    with pytest.raises(InputError, match=r"of held-out proteins, .* by chance"):
        fit_head(pair[1], examples, FitOptions(strength=1e4))


def test_proteins_that_are_alike_are_held_out_together(pair):
    first = examples_of(pair, 1)[0]
    fitted = fit_head(
        pair[1], [first, ProteinContacts("copy", first.sequence, first.contacts)], FitOptions(strength=1.0)
    )
    assert not fitted.held_out


def test_a_refused_fit_does_not_block_the_one_that_it_advises(pair, tmp_path):
    folder = save(pair[0], tmp_path / "model")
    fit = ["contacts", "fit", *contact_list(tmp_path), "-o", str(tmp_path / "head.safetensors"), "-m", str(folder)]
    refused = CliRunner().invoke(cli, [*fit, "--strength", "1e-9"])
    assert "every weight is 0" in str(refused.exception)
    assert "a larger --strength" in str(refused.exception)
    # it goes on with the features of the first one, whatever becomes of the fit
    again = CliRunner().invoke(cli, [*fit, "--strength", "1"])
    assert "another job" not in str(again.exception)
    assert "continuing after 3 of 3" in again.stderr


def test_a_refused_fit_does_not_block_one_of_other_proteins(pair, tmp_path):
    folder = save(pair[0], tmp_path / "model")
    end = ["-o", str(tmp_path / "head.safetensors"), "-m", str(folder)]
    (tmp_path / "few").mkdir()
    few = ["contacts", "fit", *contact_list(tmp_path / "few", 2), *end, "--strength", "1e-9"]
    assert "every weight is 0" in str(CliRunner().invoke(cli, few).exception)
    # it advises more proteins, which make another job
    again = CliRunner().invoke(cli, ["contacts", "fit", *contact_list(tmp_path), *end])
    # computed anew, and judged: random contacts are no knowledge
    assert "no head of" in str(again.exception)
    assert "continuing" not in again.stderr
