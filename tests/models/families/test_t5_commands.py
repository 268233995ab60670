"""A random T5 encoder goes through the commands that need no head; contact maps with a bias of distances."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import longlens
from contact_lists import contact_list
from esm_peer import protein
from longlens.cli.main import cli, main
from longlens.lens.contacts import KeptMap, Regression, WholeMap
from t5_peer import encoder, save

FLOAT32 = ("--dtype", "float32")
TEXTS = {"a": protein(40, 1), "b": protein(25, 2)}
pytestmark = pytest.mark.filterwarnings("ignore:.*non-commercial.*:longlens.errors.LonglensWarning")


@pytest.fixture(scope="module", params=["ProtT5", "ProstT5", "Ankh"])
def work(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    model = encoder(request.param)
    save(model, path / "model", request.param)
    (path / "proteins.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in TEXTS.items()))
    (path / "one.fasta").write_text(f">a\n{TEXTS['a']}\n")
    return path, model


def run(*words) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def refusal(monkeypatch, capsys):
    """A function that runs a command, which must end with status 2, and gives its message."""

    def run_it(*words) -> str:
        monkeypatch.setattr("sys.argv", ["longlens", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert "Traceback" not in said
        return " ".join(said.split())

    return run_it


def attentions_of(theirs, tokens):
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        return theirs(input_ids=tokens.unsqueeze(0), output_attentions=True).attentions


def test_embed_and_plan(work):
    path, theirs = work
    assert "fits           yes" in run("plan", path / "proteins.fasta", "--model", path / "model")
    run("embed", path / "proteins.fasta", "-o", path / "vectors", "--model", path / "model", "--include", "mean",
        "--include", "per-tok", *FLOAT32)  # fmt: skip
    results = longlens.open_results(path / "vectors")
    model = longlens.load(path / "model")
    tokens = model.pack(TEXTS["b"]).tokens
    with torch.no_grad():
        last = theirs(input_ids=tokens.unsqueeze(0)).last_hidden_state[0, model.alphabet.residues(len(tokens))]
    assert len(last) == 25
    depth = model.config.layers
    np.testing.assert_allclose(results[f"mean/{depth}"][1], last.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results.residues(f"per_tok/{depth}", results.table[1]), last, rtol=1e-4, atol=1e-5)


def test_what_needs_a_head_is_refused(work, refusal):
    path, _ = work
    for command in (
        ["score", "--fasta", path / "one.fasta", "--all", "-o", path / "scores.csv"],
        ["embed", path / "one.fasta", "-o", path / "refused", "--include", "surprise"],
    ):
        assert "no logits, surprise or scores" in refusal(*command, "--model", path / "model")
    half = ("embed", path / "one.fasta", "-o", path / "half", "--model", path / "model", "--dtype", "float16")
    assert "trained in bfloat16" in refusal(*half)


def test_look_and_watch(work):
    path, theirs = work
    run("look", path / "one.fasta", "-o", path / "look", "--model", path / "model", "--no-figures", *FLOAT32)
    (manifest,) = (path / "look").glob("*.json")
    assert json.loads(manifest.read_text())
    ours = longlens.load(path / "model", dtype="float32")
    packed = ours.pack(TEXTS["a"])
    with longlens.watch(ours) as seen, torch.no_grad():
        ours(packed)
    for layer, matrix in enumerate(attentions_of(theirs, packed.tokens)):
        entropy = -(matrix * matrix.clamp(min=1e-30).log()).sum(-1)
        torch.testing.assert_close(seen.entropy[layer].values, entropy, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [WholeMap, KeptMap])
def test_contact_maps_have_the_bias_in_their_weights(work, kind):
    """The map of a made-up regression, against the definition on transformers' attention matrices."""
    path, theirs = work
    ours = longlens.load(path / "model", dtype="float32")
    shape = (ours.config.layers, ours.config.heads)
    regression = Regression(torch.randn(shape), -0.3)
    packed = ours.pack(list(TEXTS.values()))
    maps = [kind(len(text), regression, *([ours.device] if kind is WholeMap else [])) for text in TEXTS.values()]
    with torch.no_grad():
        ours(packed, observers=[longlens.lens.contacts.ContactObserver(maps, before=ours.alphabet.before)])
    start = 0
    for text, contact_map in zip(TEXTS.values(), maps, strict=True):
        stop = start + len(text) + ours.alphabet.around
        residues = ours.alphabet.residues(stop - start)
        logits = torch.full((len(text), len(text)), regression.bias, dtype=torch.float64)
        for layer, matrix in enumerate(attentions_of(theirs, packed.tokens[start:stop])):
            inner = matrix[0, :, residues, residues].double()
            both = inner + inner.mT
            both -= both.sum(2, keepdim=True) * both.sum(1, keepdim=True) / both.sum((1, 2), keepdim=True)
            logits += (regression.weight[layer].double().view(-1, 1, 1) * both).sum(0)
        got = torch.cat([
            torch.cat([torch.zeros(len(rows.probabilities), rows.first), rows.probabilities], 1)
            for rows in contact_map.rows()
        ])  # fmt: skip
        torch.testing.assert_close(got.triu().double(), logits.sigmoid().triu(), rtol=1e-4, atol=1e-4)
        start = stop


def test_a_fitted_head_gives_contact_maps(work):
    path, _ = work
    run("contacts", "fit", *contact_list(path), "-o", path / "head.safetensors", "--model", path / "model",
        "--strength", "100", *FLOAT32)  # fmt: skip
    maps = longlens.contacts(
        path / "one.fasta", model=path / "model", output=path / "maps", head=path / "head.safetensors", dtype="float32"
    )
    matrix = maps.matrix("a")
    assert matrix.shape == (40, 40)
    assert np.isfinite(matrix).all()
    assert (matrix == matrix.T).all()
