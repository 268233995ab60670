"""A folder of random ESM-C goes through every command that proteins have."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import EsmcConfig, EsmcForMaskedLM

import longlens
from contact_lists import contact_list
from esm_peer import protein
from family_peer import randomise
from longlens.cli.main import cli
from longlens.errors import InputError, LonglensWarning, SequenceError
from longlens.models.families.registry import FAMILIES

FLOAT32 = ("--dtype", "float32")
TEXTS = {"a": protein(40, 1), "b": protein(25, 2)}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    path = tmp_path_factory.mktemp("esmc")
    model = EsmcForMaskedLM(EsmcConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    ))  # fmt: skip
    randomise(model)
    model.save_pretrained(path / "model")
    (path / "proteins.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in TEXTS.items()))
    (path / "one.fasta").write_text(f">a\n{TEXTS['a']}\n")
    return path, model.eval()


def run(*words) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_embed_with_surprise(work):
    path, theirs = work
    included = [word for name in ("mean", "surprise") for word in ("--include", name)]
    run("embed", path / "proteins.fasta", "-o", path / "vectors", "--model", path / "model", *included, *FLOAT32)
    results = longlens.open_results(path / "vectors")
    tokens = longlens.load(path / "model").pack(TEXTS["b"]).tokens.unsqueeze(0)
    with torch.no_grad():
        out = theirs(tokens, output_hidden_states=True)
    truth = out.logits.log_softmax(-1)[0, 1:-1].gather(1, tokens[0, 1:-1, None]).squeeze(1)
    np.testing.assert_allclose(results["mean/2"][1], out.hidden_states[-1][0, 1:-1].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results.residues("surprise", results.table[1]), -truth, rtol=1e-4, atol=1e-4)


def test_plan_and_score(work):
    path, theirs = work
    said = run("plan", path / "proteins.fasta", "--model", path / "model")
    assert "fits           yes" in said
    run("score", "--fasta", path / "one.fasta", "--all", "-o", path / "scores.csv", "--model", path / "model")
    lines = (path / "scores.csv").read_text().splitlines()
    assert len(lines) == 1 + 40
    ours = longlens.load(path / "model", dtype="float32")
    scored = longlens.score(TEXTS["a"], [f"{TEXTS['a'][4]}5W"], model=ours).scores
    tokens = ours.pack(TEXTS["a"]).tokens.clone()
    wild = int(tokens[5])
    tokens[5] = 32
    with torch.no_grad():
        log_p = theirs(tokens.unsqueeze(0)).logits[0, 5].log_softmax(-1)
    assert scored[0] == pytest.approx(float(log_p[22] - log_p[wild]), abs=1e-4)


def test_look_and_watch(work):
    path, theirs = work
    run(
        "look", path / "one.fasta", "-o", path / "look", "--model", path / "model", "--no-figures", "--dtype", "float32"
    )
    (manifest,) = (path / "look").glob("*.json")
    assert json.loads(manifest.read_text())
    ours = longlens.load(path / "model", dtype="float32")
    packed = ours.pack(TEXTS["a"])
    with longlens.watch(ours) as seen, torch.no_grad():
        ours(packed)
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        weights = theirs(packed.tokens.unsqueeze(0), output_attentions=True).attentions
    for layer, matrix in enumerate(weights):
        entropy = -(matrix * matrix.clamp(min=1e-30).log()).sum(-1)
        torch.testing.assert_close(seen.entropy[layer].values, entropy, rtol=1e-3, atol=1e-4)


def test_a_fitted_head_gives_contact_maps(work):
    path, _ = work
    with pytest.raises(InputError, match="`longlens contacts fit` fits one"):
        longlens.contacts(path / "one.fasta", model=path / "model")
    run("contacts", "fit", *contact_list(path), "-o", path / "head.safetensors", "--model", path / "model",
        "--strength", "100", *FLOAT32)  # fmt: skip
    maps = longlens.contacts(
        path / "one.fasta", model=path / "model", output=path / "maps", head=path / "head.safetensors", dtype="float32"
    )
    matrix = maps.matrix("a")
    assert matrix.shape == (40, 40)
    assert np.isfinite(matrix).all()
    run("contacts", path / "one.fasta", "-o", path / "maps", "--model", path / "model", "--head",
        path / "head.safetensors", *FLOAT32)  # fmt: skip


COMPLEX = f"{protein(30, 3)}|{protein(21, 4)}"


@pytest.fixture(scope="module")
def complexes(work):
    """A complex, written as fair-esm's users do, beside a single chain."""
    path, _ = work
    (path / "complex.fasta").write_text(f">ab\n{COMPLEX.replace('|', ':')}\n>a\n{TEXTS['a']}\n")
    return path / "complex.fasta", longlens.load(path / "model", dtype="float32")


def _log_p(model, text, masked=None):
    packed = model.pack(text)
    if masked is not None:
        packed.tokens[masked + 1] = 32
    with torch.no_grad():
        return model.logits(model(packed).last).log_softmax(-1)[1:-1].numpy()


@pytest.mark.parametrize("surprise", ["wt", "masked"])
def test_embedding_a_complex_is_what_python_gives(work, complexes, tmp_path, surprise):
    path, (fasta, model) = work[0], complexes
    included = [word for name in ("mean", "per-tok", "surprise") for word in ("--include", name)]
    run("embed", fasta, "-o", tmp_path / "out", "--model", path / "model", *included, "--surprise", surprise, *FLOAT32)
    results = longlens.open_results(tmp_path / "out")
    row = results.table[0]
    assert row["length"] == len(COMPLEX) == 52
    with torch.no_grad():
        hidden = model(model.pack(COMPLEX)).last[1:-1].numpy()
    residues = np.array([letter != "|" for letter in COMPLEX])
    np.testing.assert_allclose(results.residues("per_tok/2", row), hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results["mean/2"][0], hidden[residues].mean(0), rtol=1e-4, atol=1e-5)
    tokens = model.alphabet.encode(COMPLEX)[1:-1]
    if surprise == "wt":
        log_p = _log_p(model, COMPLEX)
    else:
        log_p = np.stack([_log_p(model, COMPLEX, place)[place] for place in range(len(COMPLEX))])
    wanted = np.where(residues, -log_p[np.arange(len(tokens)), tokens], np.nan)
    np.testing.assert_allclose(results.residues("surprise", row), wanted, rtol=1e-4, atol=1e-4)
    assert results.residues("rank", row)[30] == 0
    assert row["surprise"] == pytest.approx(np.nanmean(wanted), rel=1e-4)
    # chains joined without a break give other vectors
    joined = longlens.embed(COMPLEX.replace("|", ""), model=model)[0]
    assert np.abs(joined - results["mean/2"][0]).max() > 1e-3


def test_scoring_a_complex_is_what_python_gives(complexes):
    _, model = complexes
    first = COMPLEX[31]
    mutant = "W" if first != "W" else "A"
    name = f"{first}32{mutant}"
    number = model.alphabet.number
    for strategy, log_p in (("wt-marginals", _log_p(model, COMPLEX)), ("masked-marginals", _log_p(model, COMPLEX, 31))):
        scored = longlens.score(COMPLEX, [name], model=model, scoring_strategy=strategy).scores
        assert scored[0] == pytest.approx(log_p[31, number(mutant)] - log_p[31, number(first)], abs=1e-4)
        matrix = longlens.score(COMPLEX, model=model, scoring_strategy=strategy)
        assert matrix[name] == pytest.approx(scored[0], abs=1e-4)
        assert np.isnan(matrix.matrix).any(1).tolist() == [letter == "|" for letter in COMPLEX]
    mutated = f"{COMPLEX[:31]}{mutant}{COMPLEX[32:]}"
    wanted = sum(
        _log_p(model, mutated, place)[place, number(letter)] for place, letter in enumerate(mutated) if letter != "|"
    )
    pseudo = longlens.score(COMPLEX, [name], model=model, scoring_strategy="pseudo-ppl").scores
    assert pseudo[0] == pytest.approx(wanted, abs=1e-3)


def test_looking_at_a_complex_and_planning_it(work, complexes, tmp_path):
    path, (fasta, model) = work[0], complexes
    assert "2, 92 residues" in run("plan", fasta, "--model", path / "model")
    looks = longlens.look({"ab": COMPLEX}, model=model, collect=["entropy", "surprise"], figures=False)
    predicted = np.array(looks["ab"]["tokens"]["surprise"], float)
    assert np.isnan(predicted).nonzero()[0].tolist() == [0, 31, 53]
    run("look", fasta, "-o", tmp_path / "look", "--model", path / "model", "--no-figures", *FLOAT32)


def test_other_models_and_commands_refuse_a_complex_and_say_who_takes_it(work, complexes):
    path, (fasta, model) = work[0], complexes
    words = r"got ':' at position 31; split a complex .*`embed`, `plan`, `score` and `look` .*ESM-C"
    with pytest.raises(SequenceError, match=words):
        longlens.embed(fasta)
    with pytest.raises(SequenceError, match=words):
        longlens.context(fasta, model=model)
    with pytest.raises(SequenceError, match=words):
        longlens.score(COMPLEX.replace("|", ":"), ["A1G"], model=[path / "model", "tiny"])
    with pytest.warns(LonglensWarning, match="1 record is skipped"):
        kept = longlens.embed(fasta, on_error="skip")
    assert [row["problem"] is None for row in kept.table] == [True, False]
    assert [family.name for family in FAMILIES if family.chains] == ["ESM-C"]
    with pytest.raises(SequenceError, match=r"record 1 \(x\), chain 2: expected at least one residue"):
        longlens.embed({"x": "MKT|"}, model=model)
