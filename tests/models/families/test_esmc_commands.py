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
from longlens.errors import InputError

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
