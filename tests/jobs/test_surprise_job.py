"""`longlens.surprise` and `longlens surprise`: tables by token, word and line, files, resuming, memory, bad input."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

import longlens
import text_models as texts
from longlens.cli.main import cli
from longlens.errors import CheckpointError, InputError, LonglensWarning, SequenceError, UnsupportedError
from longlens.hf.texts import load_text_model
from longlens.io.columns import columns_as, columns_from
from longlens.jobs import surprise_job, text_reading
from longlens.jobs.surprise_tables import SurprisedText, after_blank, block_error, word_bounds, word_surprise
from longlens.testing import peak_growths

LN2 = math.log(2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "gpt2": texts.gpt2_folder(root / "gpt2"),
        "llama": texts.llama_folder(root / "llama"),
        "bert": texts.bert_folder(root / "bert"),
        "headless": texts.bert_folder(root / "headless", headless=True),
    }


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(texts.TEXT)
    return path


def run(*arguments, **keywords):
    return CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False, **keywords)


def dense_surprise(folder, text):
    """(N,) nats of each token after the start token, from the model's logits in float64."""
    model = load_text_model(str(folder))
    ids = torch.tensor([model.tokenizer.bos_token_id, *model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        log_p = model.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return -log_p[:-1].gather(1, ids[1:, None])[:, 0].numpy()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tokens_lines_and_the_summary(folders, text, name):
    expected = dense_surprise(folders[name], texts.TEXT)
    found = longlens.surprise(text, model=folders[name])
    np.testing.assert_allclose(found["surprise"], expected, atol=1e-5)
    assert "".join(dict.fromkeys(found["text"])) != ""
    for start, stop, piece in zip(found["start"], found["stop"], found["text"], strict=True):
        assert texts.TEXT[start:stop] == piece
    assert found["seen"].tolist() == list(range(len(expected)))
    size = len(texts.TEXT.encode())
    assert found.summary["bytes"] == size
    assert found.summary["bits_per_byte"] == pytest.approx(expected.sum() / LN2 / size)
    assert found.summary["perplexity"] == pytest.approx(math.exp(expected.mean()))
    assert found.summary["special_tokens"] == "<|end|>"
    lines = longlens.surprise(text, model=folders[name], by="line", unit="bits")
    assert lines["text"] == texts.TEXT.split("\n")[:-1]
    assert lines["surprise"].sum() == pytest.approx(expected.sum() / LN2)
    assert lines["bytes"].sum() == size
    assert lines["tokens"].sum() == len(expected)
    assert found.columns()["z"] == pytest.approx((found["surprise"] - found["entropy"]) / z_scale(found), rel=1e-4)


def z_scale(found):
    return (found["surprise"] - found["entropy"]) / found["z"]


def test_words_are_those_between_blanks(folders, text):
    words = longlens.surprise(text, model=folders["gpt2"], by="word")
    assert words["text"][:-1] == texts.TEXT.split()
    # what follows the last word
    assert words["text"][-1] == "\n"
    tokens = longlens.surprise(text, model=folders["gpt2"])
    assert words["uncorrected"].sum() == pytest.approx(tokens["surprise"].sum())
    assert words["tokens"].sum() == len(tokens)
    # the corrections of neighbours cancel: what is left is that of the end, and this text ends with a blank
    assert np.abs(words["surprise"] - words["uncorrected"]).max() > 0.1
    assert words["surprise"].sum() == pytest.approx(words["uncorrected"].sum())
    cut = longlens.surprise(texts.TEXT.strip(), model=folders["gpt2"], by="word")
    assert cut["surprise"].sum() > cut["uncorrected"].sum() + 0.01
    assert words.summary["word_correction"] == "of leading blanks"


def test_all_words_of_a_toy_tokenizer_sum_to_1():
    """A random model over a, b, _a, _b, a with a line feed, and the end: the probabilities of all words of up to 4
    tokens, of those that go on, and of the end of the text in a word's place sum to 1."""
    pieces, go_on, closing, end = ("a", "b", " a", " b", "a\n"), (0, 1), 4, 5
    begins = np.array([False, False, True, True, False, True])
    ends = np.array([False, False, False, False, True, False])
    generator = torch.Generator().manual_seed(0)
    tables: dict[tuple[int, ...], np.ndarray] = {}

    def log_p(context):
        if context not in tables:
            row = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
            tables[context] = row.numpy()
        return tables[context]

    def begin(context):
        """Log of the probability that a word begins, or the text ends."""
        certain = not context or ends[context[-1]]
        return 0.0 if certain else np.log(np.exp(log_p(context)[begins]).sum())

    def surprise_of(word, context):
        ids = np.array((*context, *word))
        count = len(ids)
        stops = np.cumsum([len(pieces[i]) for i in ids])
        rows = [log_p(tuple(ids[:place])) for place in range(count + 1)]
        certain = after_blank(ids, ends)
        mass = np.array([np.log(np.exp(row[begins]).sum()) for row in rows])
        found = SurprisedText(
            "".join(pieces[i] for i in ids), np.arange(count), stops - [len(pieces[i]) for i in ids], stops,
            np.array([-rows[t][ids[t]] for t in range(count)]), np.zeros(count), np.ones(count),
            np.ones(count, np.int64), np.arange(count), begins[ids] | certain[:-1], np.where(certain, 0.0, mass),
        )  # fmt: skip
        bounds = word_bounds(found)
        assert bounds[-1] == (len(context), count)
        return word_surprise(found, bounds)[-1], found.surprise[len(context) :].sum()

    for context in ((), (2, 0), (0, 3, 1), (2, 4)):
        # a word begins with a blank, or after one
        firsts = (0, 1, 2, 3, closing) if not context or ends[context[-1]] else (2, 3)
        total = uncorrected = longer = 0.0
        for length in range(1, 5):
            for word in product(firsts, *[(*go_on, closing)] * (length - 1)):
                if closing in word[:-1]:
                    continue
                corrected, plain = surprise_of(word, context)
                total += math.exp(-corrected)
                uncorrected += math.exp(-plain)
                if length == 4 and word[-1] != closing:
                    goes = np.exp(log_p((*context, *word))[[*go_on, closing]]).sum()
                    longer += math.exp(-plain - begin(context)) * goes
        assert total + longer + math.exp(log_p(context)[end] - begin(context)) == pytest.approx(1.0, abs=1e-12)
        assert abs(uncorrected - 1.0) > 0.05


def test_windows_and_no_start_token(folders, text):
    found = longlens.surprise(text, model=folders["gpt2"], context=20, stride=8)
    assert found["seen"].max() == 18
    assert found["seen"][20:].min() >= 19 - 8
    assert found.summary["context"] == 20
    assert found.summary["stride"] == 8
    whole = longlens.surprise(text, model=folders["gpt2"])
    np.testing.assert_allclose(found["surprise"][:19], whole["surprise"][:19], atol=1e-5)
    assert np.abs(found["surprise"] - whole["surprise"]).max() > 1e-2
    without = longlens.surprise(text, model=folders["gpt2"], bos=False)
    assert np.isnan(without["surprise"][0])
    assert not np.isnan(without["surprise"][1:]).any()
    assert without.summary["special_tokens"] == "none"
    assert without.summary["predicted"] == without.summary["tokens"] - 1
    assert without.summary["bytes"] == len(texts.TEXT.encode()) - len(without["text"][0])


def test_a_masked_model_by_both_ways(folders, text):
    masked = longlens.surprise(text, model=folders["bert"])
    seen = longlens.surprise(text, model=folders["bert"], masking="in-place")
    assert masked.summary["kind"] == "masked model, each token masked in turn"
    assert seen.summary["kind"] == "masked model, in place: the model sees the token"
    assert masked.summary["special_tokens"] == "[CLS] [SEP]"
    assert np.abs(masked["surprise"] - seen["surprise"]).max() > 1e-2
    windows = longlens.surprise(text, model=folders["bert"], context=16, stride=7)
    assert windows["seen"].tolist() == [13] * len(masked)
    words = longlens.surprise(text, model=folders["bert"], by="word")
    assert words["text"] == texts.TEXT.split()
    assert words.summary["word_correction"] == "none: sums over tokens"
    np.testing.assert_allclose(words["surprise"], words["uncorrected"])


def test_a_long_rope_is_warned_of_unless_windows_have_one_length(tmp_path, text):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = texts.llama_folder(tmp_path / "m", rope_parameters=rope, max_position_embeddings=32)
    with pytest.raises(InputError, match="--context 32 --stride 16"):
        longlens.surprise(text, model=folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["max_position_embeddings"] = 512
    config["rope_parameters"]["original_max_position_embeddings"] = 32
    path.write_text(json.dumps(config))
    with pytest.warns(LonglensWarning, match="depend on the length of the input beyond 32 tokens"):
        longlens.surprise(text, model=folder)


@pytest.mark.filterwarnings("ignore:no font")
@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "json"])
def test_files_hold_what_the_result_has(folders, text, tmp_path, suffix):
    target = tmp_path / f"out.{suffix}"
    result = run("surprise", text, "-m", folders["gpt2"], "-o", target, "--by", "word", "--figure")
    assert result.exception is None, result.exception
    assert "bits per byte  " in result.stdout
    assert "special tokens <|end|>" in result.stdout
    found = longlens.surprise(text, model=folders["gpt2"], by="word", format=suffix)
    columns = columns_from(target.read_bytes(), suffix)
    assert columns.keys() == found.columns().keys()
    assert columns["text"] == found["text"]
    np.testing.assert_allclose(columns["surprise"], found["surprise"], rtol=1e-7)
    manifest = json.loads(Path(f"{target}.manifest.json").read_text())
    assert manifest["summary"]["bits_per_byte"] == pytest.approx(found.summary["bits_per_byte"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    if suffix == "parquet":
        about = json.loads(pq.read_schema(target).metadata[b"longlens"])
        assert about["summary"]["special_tokens"] == "<|end|>"
    if suffix == "json":
        assert json.loads(target.read_bytes())["about"]["summary"]["kind"] == "causal"


def test_columns_come_back_as_they_were():
    inf = float("inf")
    columns = {
        "token": [0, 1, 2], "text": ['a,"b"', "\n\t", "inf"], "z": [0.5, float("nan"), -1e-12], "kl": [inf, 1.5, -inf],
        "lost": [inf, inf, inf],
    }  # fmt: skip
    for format in ("csv", "tsv", "parquet", "json"):
        back = columns_from(columns_as(columns, format, {}), format)
        assert back["token"] == columns["token"]
        assert back["text"] == columns["text"]
        for name in ("z", "kl", "lost"):
            np.testing.assert_allclose(back[name], columns[name])


def test_standard_input_and_output(folders):
    result = run(
        "surprise", "-", "-m", folders["gpt2"], "--by", "line", "--format", "tsv", input="The fox.\nThe dog.\n"
    )
    assert result.exception is None, result.exception
    assert result.stdout.splitlines()[0].split("\t")[:2] == ["line", "text"]
    assert "bits per byte" in result.stderr
    assert "bits per byte  " not in result.stdout


def test_an_interrupted_run_continues_to_the_same_bytes(folders, text, tmp_path, monkeypatch):
    monkeypatch.setattr(text_reading, "BUDGET", 32)
    options = {"model": folders["gpt2"], "context": 16, "stride": 6, "by": "word", "format": None}
    whole, parts = tmp_path / "whole.csv", tmp_path / "parts.csv"
    longlens.surprise(text, output=whole, **options)
    read, calls = surprise_job.read_windows, []

    def stop_at_third(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(*arguments, **keywords)

    monkeypatch.setattr(surprise_job, "read_windows", stop_at_third)
    with pytest.raises(KeyboardInterrupt, match="2 of"):
        longlens.surprise(text, output=parts, **options)
    assert not parts.exists()
    longlens.surprise(text, output=parts, **options)
    assert parts.read_bytes() == whole.read_bytes()
    total = text_reading.BUDGET // 16
    assert len(calls) - 1 < 3 + math.ceil(51 / 6 / total) + 1


BAD = {
    "missing": (["nothing.txt"], SequenceError, "nothing.txt"),
    "suffix": (["{text}", "-o", "out.xlsx"], InputError, "ends in .csv"),
    "folder": (["{text}", "-o", "there/out.csv"], InputError, "a folder that exists"),
    "two formats": (["{text}", "-o", "out.csv", "--format", "json"], InputError, "ends in .json"),
    "figure": (["{text}", "--figure"], InputError, "beside the file that --output names"),
    "stride alone": (["{text}", "--stride", "4"], InputError, "--context and --stride together"),
    "no context": (["{text}", "--context", "0", "--stride", "4"], InputError, "at least 1"),
    "small context": (["{text}", "--context", "4", "--stride", "4"], InputError, "at least 5 tokens"),
    "large context": (["{text}", "--context", "900", "--stride", "4", "--bos"], None, ""),
    "masking": (["{text}", "--surprise", "masked"], InputError, "is a causal model"),
    "method": (["{text}", "--method", "magic"], InputError, "magic"),
    "memory": (["{text}", "--max-memory", "1M"], InputError, "--max-memory"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_requests_are_refused_and_leave_no_file(folders, text, tmp_path, monkeypatch, case):
    arguments, error, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    result = run("surprise", *(a.format(text=text) for a in arguments), "-m", folders["gpt2"])
    if error is None:
        # a window larger than the text is the text
        assert result.exception is None
        return
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)
    assert set(tmp_path.iterdir()) == before


def test_texts_that_cannot_be_read(folders, tmp_path):
    cases = {
        "empty.txt": (b"", "got an empty file"), "blank.txt": (b" \n\n", "got an empty file"),
        "latin.txt": (b"caf\xe9", "expected a text in UTF-8"), "p.fasta": (b">a\nMKT\n", "got proteins"),
    }  # fmt: skip
    for name, (data, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        result = run("surprise", path, "-m", folders["gpt2"])
        assert isinstance(result.exception, InputError)
        assert message in str(result.exception)
    assert "got an empty file" in str(run("surprise", "-", "-m", folders["gpt2"], input="").exception)
    with pytest.raises(InputError, match="got an empty one"):
        longlens.surprise("", model=folders["gpt2"])


def test_models_that_cannot_do_it(folders, text, tmp_path):
    import transformers as tf

    cases = {
        "tiny": (InputError, "a model of proteins"), str(tmp_path): (CheckpointError, "expected a transformers folder"),
        str(folders["headless"]): (InputError, "predicts no tokens"),
    }  # fmt: skip
    config = tf.T5Config(vocab_size=120, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    both = texts.save(tf.T5ForConditionalGeneration(config), texts.word_piece(), tmp_path / "t5")
    cases[str(both)] = (UnsupportedError, "encoder-decoder")
    for model, (error, message) in cases.items():
        result = run("surprise", text, "-m", model)
        assert isinstance(result.exception, error), result.exception
        assert message in str(result.exception)
    assert "--model" in str(run("surprise", text).exception.format_message())
    result = run("surprise", text, "-m", folders["bert"], "--no-bos")
    assert "is a masked model" in str(result.exception)


def test_a_text_beyond_the_positions_is_refused_with_the_windows_to_ask_for(tmp_path, text):
    folder = texts.gpt2_folder(tmp_path / "short", positions=32)
    result = run("surprise", text, "-m", folder)
    assert "--context 32 --stride 16" in str(result.exception)
    assert "got 52" in str(result.exception)
    result = run("surprise", text, "-m", folder, "--context", "33", "--stride", "16")
    assert "a --context of at most 32 tokens" in str(result.exception)
    assert run("surprise", text, "-m", folder, "--context", "32", "--stride", "16").exception is None


def test_the_error_of_a_mean_counts_dependence():
    generator = np.random.default_rng(0)
    white = generator.normal(size=4096)
    assert block_error(white) == pytest.approx(1 / 64, rel=0.15)
    # an average over 8 neighbours: the error of the mean stays, which the deviation / sqrt(n) would miss
    smooth = np.convolve(white, np.ones(8) / 8, "same")
    assert block_error(smooth) > 2 * smooth.std() / 64
    assert math.isnan(block_error(white[:7]))


@pytest.mark.memory
def test_memory_is_linear_in_the_tokens():
    """Two layers of width 32 and a vocabulary of 4,096: the growth from N to 2N is far below N x V and N x N."""
    here = str(Path(__file__).parent)
    cases = [{"length": 4096}, {"length": 8192}]
    one, two = peak_growths("surprise_pass:surprise_pass", cases, path=[here], warm_up={"length": 64}, runs=1)
    print(f"4,096 tokens {one / 2**20:.1f} MiB, 8,192 tokens {two / 2**20:.1f} MiB")
    # logits alone would grow by 4,096 x 4,096 x 4 bytes
    assert two - one < 4096 * 4096 * 4 / 4
    assert two < 2.2 * one + 2**23
