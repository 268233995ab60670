"""Texts of which a causal model without a start token can predict nothing, or nothing that has a byte of its own."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

import longlens
import text_models as texts
from longlens.cli.main import cli, main
from longlens.errors import InputError, SequenceError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "bare": texts.gpt2_folder(root / "bare", bos=False),
        "bare too": texts.gpt2_folder(root / "too", bos=False, seed=1),
        "started": texts.gpt2_folder(root / "started"),
    }


CALLS = {
    "surprise": lambda folders, text, out: longlens.surprise(text, model=folders["bare"], output=out),
    "compare": lambda folders, text, out: longlens.compare_models(
        folders["bare"], folders["bare too"], text, output=out
    ),
    "context": lambda folders, text, out: longlens.context(
        text, input="text", model=folders["bare"], output=out, figures=False
    ),
    "context, a target": lambda folders, text, out: longlens.context(
        text, input="text", model=folders["bare"], output=out, figures=False, targets="a"
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_text_of_one_token_is_refused(folders, tmp_path, call):
    out = tmp_path / "out.csv"
    with pytest.raises(InputError, match=r"at least 2 tokens, .* got 1 token \('a'\).*; give a longer text$"):
        CALLS[call](folders, "a", out)
    assert not list(tmp_path.iterdir())


def test_a_start_token_that_was_declined_is_named(folders):
    with pytest.raises(InputError, match="leave out --no-bos"):
        longlens.surprise("a", model=folders["started"], bos=False)
    assert len(longlens.surprise("a", model=folders["started"])) == 1


@pytest.mark.parametrize("name", ["nosuch.txt", "my letter.txt", "./x", "/no/such file", "book.TXT"])
def test_the_name_of_a_file_that_is_not_there_is_no_text(folders, name):
    with pytest.raises(SequenceError, match=f"{name}: expected a file or a text, found no file of this name"):
        longlens.surprise(name, model=folders["started"])
    for call in (
        lambda: longlens.compare_models(folders["started"], folders["started"], name),
        lambda: longlens.context(name, input="text", model=folders["started"], figures=False),
        lambda: longlens.look(name, input="text", model=folders["started"], figures=False),
    ):
        with pytest.raises(SequenceError, match="found no file of this name"):
            call()


@pytest.mark.parametrize("text", ["fox", "U.S.", "and/or", "3/4", "Hello.World", "https://a.b/c"])
def test_short_texts_are_not_taken_for_names(folders, text):
    assert "".join(longlens.surprise(text, model=folders["started"])["text"]) == text


QUOTE = "> Are you coming to the meeting on Monday?\n\nYes, I am.\n"
FASTA = ">a\nMKTAYIAKQRQISFVKSHFSRQ\n"


def _of_text(folders, text, out, command, *more):
    models = {
        "surprise": [text, "-m", folders["started"]],
        "compare-models": [folders["started"], folders["started"], text],
        "context": [text, "-m", folders["started"], "--curve", 0, "--exact", 1, "--most-surprising", 1, "--no-figures"],
    }[command]
    arguments = list(map(str, [command, *models, "-o", out, *more]))
    return CliRunner().invoke(cli, arguments, standalone_mode=False)


@pytest.mark.parametrize("command", ["surprise", "compare-models", "context"])
def test_a_text_that_begins_with_a_quote_is_read(folders, tmp_path, command):
    text = tmp_path / "mail.txt"
    text.write_text(QUOTE)
    result = _of_text(folders, text, tmp_path / "out.csv", command)
    assert result.exception is None, result.exception


@pytest.mark.parametrize("command", ["surprise", "compare-models", "context"])
def test_fasta_is_a_text_only_where_that_is_said(folders, tmp_path, command):
    text = tmp_path / "a.fasta"
    text.write_text(FASTA)
    refused = _of_text(folders, text, tmp_path / "out.csv", command)
    assert isinstance(refused.exception, InputError)
    if command != "context":
        assert "longlens embed --include surprise; if it is a text, say so with --input text" in str(refused.exception)
    result = _of_text(folders, text, tmp_path / "out.csv", command, "--input", "text")
    assert result.exception is None, result.exception


def test_another_kind_of_input_is_refused(folders):
    with pytest.raises(InputError, match="expected input 'auto' or 'text', got 'proteins'"):
        longlens.surprise("a text", model=folders["started"], input="proteins")


@pytest.mark.parametrize("command", ["surprise", "compare-models", "context"])
def test_the_commands_end_with_2_and_leave_nothing(folders, tmp_path, monkeypatch, capsys, command):
    text, out = tmp_path / "text.txt", tmp_path / "out.csv"
    text.write_text("a")
    models = {
        "surprise": [text, "-m", folders["bare"]],
        "compare-models": [folders["bare"], folders["bare too"], text],
        "context": [text, "-m", folders["bare"]],
    }[command]
    monkeypatch.setattr(sys, "argv", list(map(str, ["longlens", command, *models, "-o", out])))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "expected a text of at least 2 tokens" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [text]


def test_a_predicted_token_without_a_byte_of_its_own_has_no_bits_per_byte(folders):
    # two tokens of one character, which both stand for the whole of it
    found = longlens.surprise("\u00fc", model=folders["bare"])
    assert len(found) == 2
    assert found.summary["predicted"] == 1
    assert found.summary["bits_per_byte"] is None
    assert "no byte of its own" in repr(found)
    result = CliRunner().invoke(
        cli, ["surprise", "-", "-m", str(folders["bare"])], input="\u00fc", catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "bits per byte  -" in result.stderr
