"""`longlens look`: tables are those of the dense weights, jobs go on where they stopped, wrong input is named."""

from __future__ import annotations

import csv
import gzip
import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import longlens
from esm_peer import esm, protein, save
from longlens.cli.look import look as command
from longlens.cli.main import cli
from longlens.errors import (
    CheckpointError,
    InputError,
    LonglensWarning,
    MethodError,
    SequenceError,
    UnsupportedError,
)
from longlens.io.alphabet import ESM
from longlens.jobs import look_job as job

PROTEINS = {"one": protein(30, 1), "an/odd id": protein(17, 2), "last": protein(40, 3)}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", ".", ",", "##s", "dog")
TEXT = "the cat sat on the mat . the dog , the cat sat ."
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "pad_token_id": 0, "initializer_range": 0.3, "max_position_embeddings": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    return esm(2, 32, 4)


@pytest.fixture(scope="module")
def model_folder(theirs, tmp_path_factory):
    return save(theirs, tmp_path_factory.mktemp("model"))


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(f">{name.replace(' ', '_')} what it is\n{text}\n" for name, text in PROTEINS.items()))
    return path


def text_folder(folder, kind):
    """A small model of text with its tokenizer, in the hub's format."""
    torch.manual_seed(0)
    model = {
        "masked": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)),
        "bare": lambda: tf.BertModel(tf.BertConfig(**SIZES)),
        "causal": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(
            vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=40, initializer_range=0.3,
            bos_token_id=2, eos_token_id=3, pad_token_id=0)),
        "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**SIZES)),
    }[kind]()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind != "causal":
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # what sentence encoders are saved with: it must not shorten the text that is looked at
    tokenizer.enable_truncation(6)
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return {kind: text_folder(tmp_path_factory.mktemp(kind), kind) for kind in ("masked", "bare", "causal", "roberta")}


def run(*arguments, **keywords):
    return CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False,
                              **keywords)  # fmt: skip


def table(path):
    return {name: np.array(values) for name, values in pq.read_table(path).to_pydict().items()}


def dense(model, inputs):
    """Attention (L, H, N, N) and logits (N, V), eager."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    return torch.stack(out.attentions)[:, 0].double().numpy(), getattr(out, "logits", None)


def check_tables(folder, weights, layers, heads):
    """Every table of a profile against the weights themselves."""
    count = weights.shape[-1]
    weights = weights[np.ix_(layers, heads)]
    rows = table(folder / "rows.parquet")
    shape = (len(layers), len(heads), count)
    positions = np.arange(count)
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1)
    distance = (weights * np.abs(positions[:, None] - positions)).sum(-1)
    for name, wanted in (("entropy", entropy), ("distance", distance), ("received", weights.sum(-2))):
        np.testing.assert_allclose(rows[name].reshape(shape), wanted, rtol=1e-4, atol=1e-5)
    numbers = np.meshgrid(layers, heads, positions, indexing="ij")
    for name, wanted in zip(("layer", "head", "token"), numbers, strict=True):
        assert (rows[name].reshape(shape) == wanted).all()
    with (folder / "overview.csv").open() as file:
        overview = list(csv.DictReader(file))
    for place, (row, w) in enumerate(zip(overview, weights.reshape(-1, count, count), strict=True)):
        assert (int(row["layer"]), int(row["head"])) == (layers[place // len(heads)], heads[place % len(heads)])
        wanted = {
            "first": w[:, 0].mean(), "previous": w.diagonal(-1).sum() / count, "self": w.diagonal().sum() / count,
            "next": w.diagonal(1).sum() / count, "mean_entropy": entropy.reshape(-1, count)[place].mean(),
        }  # fmt: skip
        for name, value in wanted.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-4, abs=1e-5), name
    with np.load(folder / "pooled.npz") as pooled:
        allowed = ~np.isnan(pooled["values"])
        np.testing.assert_allclose(pooled["values"][allowed], weights[allowed], rtol=1e-4, atol=1e-6)
    for name, ends, matrix in (("top_keys", ("query", "key"), weights),
                               ("top_queries", ("key", "query"), weights.swapaxes(-1, -2))):  # fmt: skip
        links = table(folder / f"{name}.parquet")
        at = np.searchsorted(layers, links["layer"]), np.searchsorted(heads, links["head"])
        np.testing.assert_allclose(links["weight"], matrix[(*at, links[ends[0]], links[ends[1]])], rtol=1e-4, atol=1e-6)
        firsts = links["place"] == 0
        np.testing.assert_allclose(links["weight"][firsts], matrix.max(-1).ravel(), rtol=1e-4)


def test_tables_of_proteins_are_those_of_the_dense_weights(theirs, model_folder, fasta, tmp_path):
    out = tmp_path / "out"
    run(fasta, "-o", out, "-m", model_folder, "--layers", "0,-1", "--heads", "0,2", "--no-figures")
    folders = ["1_one", "2_an_odd_id", "3_last"]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == folders
    for name, (_, text) in zip(folders, PROTEINS.items(), strict=True):
        tokens = torch.from_numpy(ESM.encode(text))[None]
        weights, logits = dense(theirs, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        check_tables(out / name, weights, [0, 1], [0, 2])
        rows = table(out / name / "tokens.parquet")
        log_p = torch.log_softmax(logits[0].double(), -1)
        surprise = -log_p.gather(1, tokens[0, :, None]).squeeze(1).numpy()
        np.testing.assert_allclose(rows["surprise"][1:-1], surprise[1:-1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rows["expected"][1:-1], -(log_p.exp() * log_p).sum(-1)[1:-1], rtol=1e-4, atol=1e-5)
        assert (rows["rank"][1:-1] == 1 + (log_p > -torch.tensor(surprise)[:, None]).sum(1).numpy()[1:-1]).all()
        assert np.isnan(rows["surprise"][[0, -1]]).all()
        # a residue's number is its token's
        assert rows["label"][0] == "<cls>"
        assert "".join(rows["label"][1:-1]) == text


@pytest.mark.parametrize("kind", ["masked", "bare", "causal", "roberta"])
def test_tables_of_texts_are_those_of_the_dense_weights(kind, texts, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    result = run(tmp_path / "text.txt", "-o", out, "-m", texts[kind], "--no-figures")
    folder = out / "1_text"
    auto = {"bare": tf.AutoModel, "causal": tf.AutoModelForCausalLM}.get(kind, tf.AutoModelForMaskedLM)
    model = auto.from_pretrained(texts[kind]).eval()
    ids = [WORDS.index(word) for word in TEXT.split()]
    ids = torch.tensor([ids if kind == "causal" else [2, *ids, 3]])
    weights, logits = dense(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    check_tables(folder, weights, [0, 1], [0, 1, 2, 3])
    rows = table(folder / "tokens.parquet")
    assert list(rows["label"]) == [WORDS[number] for number in ids[0]]
    assert list(rows["special"]) == [number in (2, 3) for number in ids[0]]
    if kind == "bare":
        assert "surprise" not in rows
        assert "surprise    none" in result.output
        return
    log_p = torch.log_softmax(logits[0].double(), -1)
    if kind == "causal":
        # what the tokens before say of each; of the first nothing is said
        wanted = -log_p[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
        np.testing.assert_allclose(rows["surprise"][1:], wanted, rtol=1e-4, atol=1e-5)
        assert np.isnan(rows["surprise"][0])
        with np.load(folder / "pooled.npz") as pooled:
            above = np.triu(np.ones(weights.shape[-2:], bool), 1)
            assert (np.isnan(pooled["values"]) == above).all()
    else:
        wanted = -log_p.gather(1, ids[0, :, None]).squeeze(1)
        np.testing.assert_allclose(rows["surprise"][1:-1], wanted[1:-1], rtol=1e-4, atol=1e-5)


def test_figures_stand_beside_the_tables(model_folder, fasta, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    run(fasta, "-o", out, "-m", model_folder, "--record", "last", "--maps", "1.2,0.0", "--tokens", "5,6")
    names = {path.name for path in (out / "3_last").iterdir()}
    wanted = {f"{name}.{kind}" for name in ("overview", "tracks", "maps", "partners") for kind in ("png", "svg")}
    assert names == wanted | {"overview.csv", "tokens.parquet", "rows.parquet", "top_keys.parquet",
                              "top_queries.parquet", "pooled.npz"}  # fmt: skip
    maps = (out / "3_last" / "maps.svg").read_text()
    assert "layer 1, head 2" in maps
    assert f"N = {len(PROTEINS['last']) + 2} tokens" in maps
    assert f"{PROTEINS['last'][4]}5 looks at" in (out / "3_last" / "partners.svg").read_text()


def test_what_is_collected_is_what_is_asked(model_folder, fasta, tmp_path):
    out = tmp_path / "out"
    run(fasta, "-o", out, "-m", model_folder, "--collect", "received, column-entropy", "--record", "one")
    assert {path.name for path in (out / "1_one").iterdir()} == {
        "overview.csv", "tokens.parquet", "rows.parquet", *(f"{n}.{k}" for n in ("overview", "tracks")
                                                            for k in ("png", "svg"))
    }  # fmt: skip
    assert set(table(out / "1_one" / "rows.parquet")) == {"layer", "head", "token", "label", "received",
                                                          "column_entropy"}  # fmt: skip


def files(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["runs"]
    names = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names} | {"manifest": manifest}


def test_a_job_that_was_stopped_goes_on_with_what_is_left(model_folder, fasta, tmp_path, monkeypatch):
    run(fasta, "-o", tmp_path / "whole", "-m", model_folder, "--no-figures")
    written = []
    genuine = job.write_profile

    def failing(profile, folder, *rest, **more):
        written.append(folder.name)
        paths = genuine(profile, folder, *rest, **more)
        if len(written) == 2:
            # half a sequence is what a killed process leaves
            paths[-1].write_bytes(b"half")
            raise RuntimeError
        return paths

    monkeypatch.setattr(job, "write_profile", failing)
    again = (fasta, "-o", tmp_path / "stopped", "-m", model_folder, "--no-figures")
    with pytest.raises(RuntimeError):
        CliRunner().invoke(command, [str(a) for a in again], standalone_mode=False, catch_exceptions=False)
    done = tmp_path / "stopped" / "1_one" / "rows.parquet"
    assert not (tmp_path / "stopped" / "2_an_odd_id").exists()
    before = done.stat().st_mtime_ns
    run(*again)
    assert written == ["1_one", "2_an_odd_id", "2_an_odd_id", "3_last"]
    assert done.stat().st_mtime_ns == before
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    # a third time there is nothing to do
    run(*again)
    assert len(written) == 4
    with pytest.raises(InputError, match=r"another job[\s\S]*options.heads"):
        run(*again, "--heads", "1")


def test_standard_input_and_gzip(model_folder, texts, fasta, tmp_path):
    packed = gzip.compress(fasta.read_bytes())
    run("-", "-o", tmp_path / "a", "-m", model_folder, "--record", "one", "--no-figures", input=packed)
    assert (tmp_path / "a" / "1_one" / "rows.parquet").is_file()
    run("-", "-o", tmp_path / "b", "-m", texts["bare"], "--no-figures", input=gzip.compress(TEXT.encode()))
    assert (tmp_path / "b" / "1_standard_input" / "rows.parquet").is_file()


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["--record", "nobody"], InputError, "no record has the id nobody"),
        (["--tokens", "19"], InputError, r"record 2.*tokens of 0\.\.18, got 19"),
        (["--layers", "2"], InputError, r"layers of 0\.\.1"),
        (["--heads", "4"], InputError, r"heads of 0\.\.3"),
        (["--heads", "0", "--maps", "1.3"], InputError, "got 1.3"),
        (["--collect", "entropi"], InputError, "got entropi"),
        (["--collect", "surprise"], InputError, "what to collect"),
        (["--method", "lineer"], MethodError, "lineer"),
        (["--method", "linear"], UnsupportedError, "linear"),
    ],
)
def test_wrong_wishes_are_named(arguments, error, said, model_folder, fasta, tmp_path):
    with pytest.raises(error, match=said):
        run(fasta, "-o", tmp_path / "out", "-m", model_folder, "--no-figures", *arguments)


def test_wrong_texts_are_named(texts, model_folder, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    path, out = tmp_path / "text.txt", tmp_path / "out"

    def refused(error, said, text, model, *more):
        path.write_bytes(text)
        with pytest.raises(error, match=said):
            run(path, "-o", out, "-m", model, "--no-figures", *more)
        assert not out.exists()

    refused(InputError, r"at most 40 tokens.*got 53", b"the cat sat on " * 12 + b"the the the", texts["masked"])
    # two of RoBERTa's 40 positions are those of padding
    refused(InputError, r"at most 39 tokens.*got 40", b"cat " * 38, texts["roberta"])
    refused(SequenceError, "empty file", b" \n", texts["masked"])
    refused(SequenceError, "UTF-8", b"\xff\xfe\x00", texts["masked"])
    refused(UnsupportedError, "no head", TEXT.encode(), texts["bare"], "--collect", "entropy,surprise")
    refused(InputError, "a model of proteins", TEXT.encode(), "tiny")
    refused(CheckpointError, "found no folder of the name", TEXT.encode(), tmp_path / "nothing")
    (tmp_path / "nothing").mkdir()
    refused(CheckpointError, "configuration and a tokenizer", TEXT.encode(), tmp_path / "nothing")
    with pytest.raises(SequenceError, match="expected a file, found none"):
        run(tmp_path / "none.txt", "-o", out, "-m", texts["bare"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(CheckpointError, r"longlens\[hf\]", TEXT.encode(), texts["bare"])


def test_positions_that_a_protein_model_lacks_are_named(tmp_path, fasta):
    fasta.write_text(f">long\n{'A' * 600}\n")
    with pytest.raises(InputError, match=r"long.*at most 510 residues"):
        run(fasta, "-o", tmp_path / "out", "-m", "antiberty", "--no-figures")


def test_records_that_cannot_be_read_are_left_out(model_folder, tmp_path):
    (tmp_path / "p.fasta").write_text(">a\nMKTAYIAKQR\n>b\nM1T\n")
    with pytest.warns(LonglensWarning, match="1 record is skipped"):
        looks = longlens.look(tmp_path / "p.fasta", model=model_folder, figures=False, on_error="skip")
    assert looks.ids == ["a"]
    (skipped,) = looks.skipped
    assert (skipped["id"], "got '1' at position 2" in skipped["problem"]) == ("b", True)
    arguments = [
        "look",
        str(tmp_path / "p.fasta"),
        "-o",
        str(tmp_path / "out"),
        "-m",
        str(model_folder),
        "--no-figures",
    ]
    result = CliRunner().invoke(cli, [*arguments, "--on-error", "skip"], standalone_mode=False)
    assert (result.exception, result.return_value) == (None, 3)
    assert "skipped     1 records: see `skipped` in" in result.stdout


def test_a_record_in_the_lost_part_of_a_file_is_not_called_absent(model_folder, tmp_path):
    whole = gzip.compress("".join(f">p{n}\n{protein(300, n)}\n" for n in range(200)).encode())
    (tmp_path / "cut.fasta.gz").write_bytes(whole[: len(whole) // 2])
    common = {"model": model_folder, "figures": False, "on_error": "skip"}
    with pytest.raises(InputError, match=r"no record has the id p199; .*cut off"):
        longlens.look(tmp_path / "cut.fasta.gz", record="p199", **common)
    with pytest.warns(LonglensWarning, match="cut off"):
        looks = longlens.look(tmp_path / "cut.fasta.gz", record="p1", **common)
    assert (looks.ids, len(looks.skipped)) == (["p1"], 1)
