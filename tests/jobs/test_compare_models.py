"""`longlens.compare_models` and `longlens compare-models`."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import transformers as tf
from click.testing import CliRunner

import longlens
import text_models as texts
from longlens.cli.main import cli
from longlens.errors import CheckpointError, InputError, LonglensWarning, SequenceError
from longlens.hf.texts import load_text_model
from longlens.jobs import compare_job, text_reading


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "a": texts.gpt2_folder(root / "a", seed=0),
        "b": texts.gpt2_folder(root / "b", seed=1),
        "llama": texts.llama_folder(root / "llama"),
        "bert": texts.bert_folder(root / "bert"),
        "bert2": texts.bert_folder(root / "bert2", seed=1),
        "headless": texts.bert_folder(root / "headless", headless=True),
        "other": texts.save(
            tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)),
            texts.byte_level(size=290), root / "other",
        ),
    }  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(texts.TEXT)
    return path


def run(*arguments, **keywords):
    return CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False, **keywords)


def dense(folder, ids):
    with torch.no_grad():
        return load_text_model(str(folder)).model(input_ids=ids[None]).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("second", ["b", "llama"])
def test_causal_models_equal_the_dense_computation(folders, text, second):
    tokenizer = load_text_model(str(folders["a"])).tokenizer
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(texts.TEXT)["input_ids"]])
    p, q = (dense(folders[name], ids)[:-1] for name in ("a", second))
    found = longlens.compare_models(folders["a"], folders[second], text)
    np.testing.assert_allclose(found["kl_ab"], (p.exp() * (p - q)).sum(-1).numpy(), atol=1e-4)
    np.testing.assert_allclose(found["kl_ba"], (q.exp() * (q - p)).sum(-1).numpy(), atol=1e-4)
    difference = (p - q).gather(1, ids[1:, None])[:, 0].numpy()
    np.testing.assert_allclose(found["difference"], difference, atol=1e-4)
    assert found["agree"].tolist() == (p.argmax(-1) == q.argmax(-1)).int().tolist()
    for name, folder in (("surprise_a", folders["a"]), ("surprise_b", folders[second])):
        alone = longlens.surprise(text, model=folder)
        np.testing.assert_allclose(found[name], alone["surprise"], atol=1e-5)
    assert found.summary["mean_kl_ab"] == pytest.approx(found["kl_ab"].mean())
    assert found.summary["mean_difference"] == pytest.approx(difference.mean(), abs=1e-5)
    assert found["seen"].tolist() == list(range(len(ids) - 1))


@pytest.mark.parametrize("masking", ["masked", "in-place"])
def test_masked_models(folders, text, masking):
    found = longlens.compare_models(folders["bert"], folders["bert2"], text, masking=masking, context=24, stride=9)
    for name, folder in (("surprise_a", "bert"), ("surprise_b", "bert2")):
        alone = longlens.surprise(text, model=folders[folder], masking=masking, context=24, stride=9)
        np.testing.assert_allclose(found[name], alone["surprise"], atol=1e-5)
        assert found["seen"].tolist() == alone["seen"].tolist()
    assert (found["kl_ab"] > 0).all()


def test_a_model_beside_itself_and_a_head_with_more_rows(folders, text, tmp_path):
    same = longlens.compare_models(folders["a"], folders["a"], text)
    assert same.summary["mean_kl_ab"] == same.summary["mean_difference"] == 0.0
    assert same.summary["same_first_choice"] == 1.0
    model = tf.AutoModelForCausalLM.from_pretrained(folders["a"])
    model.resize_token_embeddings(len(texts.byte_level()) + 8)
    padded = texts.save(model, texts.byte_level(), tmp_path / "padded")
    with pytest.warns(LonglensWarning, match="compared on the first"):
        found = longlens.compare_models(folders["a"], padded, text)
    np.testing.assert_allclose(found["kl_ab"], 0.0, atol=1e-5)


def test_the_first_token_without_a_start_token_has_no_numbers(folders, text):
    found = longlens.compare_models(folders["a"], folders["b"], text, bos=False)
    assert np.isnan(found["kl_ab"][0])
    assert np.isnan(found["difference"][0])
    assert not np.isnan(found["kl_ab"][1:]).any()
    assert found.summary["predicted"] == found.summary["tokens"] - 1
    assert not math.isnan(found.summary["mean_kl_ab"])


def test_command_and_files(folders, text, tmp_path):
    target = tmp_path / "out.parquet"
    result = run("compare-models", folders["a"], folders["b"], text, "-o", target)
    assert result.exception is None, result.exception
    assert "KL(a||b)" in result.stdout
    manifest = json.loads((tmp_path / "out.parquet.manifest.json").read_text())
    assert (manifest["model"]["name"], manifest["other"]["name"]) == ("a", "b")
    result = run("compare-models", folders["a"], folders["b"], "-", "--format", "json", input=texts.TEXT)
    assert json.loads(result.stdout)["columns"]["token"][0] == 1
    assert "KL(a||b)" in result.stderr


def test_an_interrupted_run_continues_to_the_same_bytes(folders, text, tmp_path, monkeypatch):
    monkeypatch.setattr(text_reading, "BUDGET", 32)
    options = {"context": 16, "stride": 6}
    whole, parts = tmp_path / "whole.csv", tmp_path / "parts.csv"
    longlens.compare_models(folders["a"], folders["b"], text, output=whole, **options)
    compare, calls = compare_job.divergence, []

    def stop_at_third(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compare(*arguments, **keywords)

    monkeypatch.setattr(compare_job, "divergence", stop_at_third)
    with pytest.raises(KeyboardInterrupt, match="2 of"):
        longlens.compare_models(folders["a"], folders["b"], text, output=parts, **options)
    longlens.compare_models(folders["a"], folders["b"], text, output=parts, **options)
    assert parts.read_bytes() == whole.read_bytes()


def test_bad_input(folders, text, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    a, b = folders["a"], folders["b"]
    cases = [
        ((a, folders["other"], text), InputError, "two models of one tokenizer"),
        ((a, folders["bert"], text), InputError, "two models of one tokenizer"),
        ((folders["bert"], folders["headless"], text), InputError, "predicts no tokens"),
        ((a, tmp_path, text), CheckpointError, "expected a transformers folder"),
        ((a, "tiny", text), InputError, "a model of proteins"),
        ((a, b, tmp_path / "nothing.txt"), SequenceError, "nothing.txt"),
        ((a, b, tmp_path / "empty.txt"), InputError, "got an empty file"),
        ((a, b, tmp_path / "latin.txt"), InputError, "expected a text in UTF-8"),
        ((a, b, text, "--context", "9"), InputError, "--context and --stride together"),
        ((a, b, text, "--surprise", "masked"), InputError, "is a causal model"),
        ((a, b, text, "--max-memory", "1M"), InputError, "--max-memory"),
        ((a, b, text, "-o", tmp_path / "o.xlsx"), InputError, "ends in .csv"),
    ]
    for arguments, error, message in cases:
        result = run("compare-models", *arguments)
        assert isinstance(result.exception, error), (arguments, result.exception)
        assert message in str(result.exception)
    short = texts.gpt2_folder(tmp_path / "short", positions=32)
    assert "--context 32 --stride 16" in str(run("compare-models", a, short, text).exception)
    # one tokenizer, two kinds of model
    count = len(texts.word_piece())
    causal = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=count, n_embd=32, n_layer=1, n_head=2))
    kind = texts.save(causal, texts.word_piece(), tmp_path / "causal")
    result = run("compare-models", folders["bert"], kind, text)
    assert isinstance(result.exception, InputError)
    assert "expected two causal or two masked models" in str(result.exception)
