"""The group: help, errors, interruption, a reader that goes away."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import longlens.cli.main as under_test
from longlens.cli.aliases import ALIASES
from longlens.errors import MethodError


def longlens(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command as a user does."""
    program = Path(sys.executable).with_name("longlens")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def test_help_names_every_command() -> None:
    run = longlens("--help")
    assert run.returncode == 0
    for name, (_, line) in under_test.COMMANDS.items():
        assert f"  {name} " in run.stdout
        assert line in run.stdout


def test_version() -> None:
    run = longlens("--version")
    assert (run.returncode, run.stdout) == (0, f"longlens, version {version('longlens')}\n")


@pytest.mark.parametrize("name", sorted(under_test.COMMANDS))
def test_every_command_exists_under_its_name(name: str) -> None:
    command = under_test.cli.get_command(click.Context(under_test.cli), name)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.help


@pytest.mark.parametrize("arguments", [["nosuch"], ["methods", "--nosuch"], []])
def test_wrong_usage_is_2_and_leaves_stdout_empty(arguments: list[str]) -> None:
    run = longlens(*arguments)
    assert run.returncode == 2
    assert run.stdout == ""
    assert "Usage: longlens" in run.stderr


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_a_name_of_another_tool_is_our_command_under_our_name(name: str) -> None:
    ours = ALIASES[name][0]
    assert ours in under_test.COMMANDS
    assert name not in under_test.COMMANDS
    run, same = (CliRunner().invoke(under_test.cli, [word, "--help"]) for word in (name, ours))
    assert run.exit_code == 0
    assert run.output == same.output
    assert f"Usage: cli {ours} " in run.output
    # it is not among the commands, and has a line of its own
    listed, _, other = CliRunner().invoke(under_test.cli, ["--help"]).output.partition("Names of other tools:")
    assert f"  {name} " not in listed
    assert f"  {name} " in other


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("embde", "No such command 'embde'. Did you mean embed?"),
        ("Embed", "No such command 'Embed'. Did you mean embed?"),
        ("extrct", "No such command 'extrct'. Did you mean embed (elsewhere extract)?"),
        ("predict_contact", "Did you mean contacts (elsewhere predict-contacts)?"),
        ("xyzzy", "No such command 'xyzzy'. See `longlens --help`."),
        ("", "No such command ''."),
    ],
)
def test_the_command_meant_is_named(word: str, said: str) -> None:
    run = CliRunner().invoke(under_test.cli, [word])
    assert run.exit_code == 2
    assert said in run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["embed", "--max-memry", "1G"], "--max-memory"),
        (["explain", "--key_shap", "1"], "--key-shape"),
        (["contacts", "fit", "--treads", "1"], "--threads"),
        (["doctor", "--jsn"], "--json"),
        (["--versoin"], "--version"),
    ],
)
def test_the_option_meant_is_named(arguments: list[str], option: str) -> None:
    run = CliRunner().invoke(under_test.cli, arguments)
    assert run.exit_code == 2
    assert f"'{option}'" in run.stderr


def options_of(command: click.Command, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    """Every long option with a hyphen inside, of a command and of those inside it."""
    found = [(path, name) for parameter in command.params for name in parameter.opts if "-" in name[2:]]
    inside = command.commands.items() if isinstance(command, click.Group) else ()
    return found + [one for name, inner in inside for one in options_of(inner, (*path, name))]


@pytest.mark.parametrize("name", sorted(under_test.COMMANDS))
def test_every_option_may_be_written_with_underscores(name: str) -> None:
    command = under_test.cli.get_command(click.Context(under_test.cli), name)
    assert command is not None
    for path, option in options_of(command, (name,)):
        run = CliRunner().invoke(under_test.cli, [*path, f"--{option[2:].replace('-', '_')}=", "--help"])
        assert "No such option" not in run.output, (path, option)


def test_words_of_an_option_too() -> None:
    run = CliRunner().invoke(under_test.cli, ["score", "--scoring_strategy", "wt_marginals", "nosuch.csv"])
    assert "wt_marginals" not in run.output
    assert "'nosuch.csv' does not exist" in run.output


def run_main_with(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> int | str | None:
    @click.command()
    def failing() -> None:
        raise raised

    monkeypatch.setattr(under_test.LazyGroup, "get_command", lambda self, ctx, name: failing)
    monkeypatch.setattr(sys, "argv", ["longlens", "methods"])
    with pytest.raises(SystemExit) as stop:
        under_test.main()
    return stop.value.code


def test_an_error_of_ours_is_a_line_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main_with(monkeypatch, MethodError("unknown method 'windw'")) == 2
    assert tuple(capsys.readouterr()) == ("", "longlens: unknown method 'windw'\n")


def test_interrupted_is_130_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main_with(monkeypatch, KeyboardInterrupt()) == 130
    assert "Traceback" not in "".join(capsys.readouterr())


def test_an_error_that_is_not_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["longlens", "methods"])

    @click.command()
    def failing() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(under_test.LazyGroup, "get_command", lambda self, ctx, name: failing)
    with pytest.raises(ZeroDivisionError):
        under_test.main()


def test_a_reader_that_goes_away_ends_it_silently() -> None:
    program = Path(sys.executable).with_name("longlens")
    # the pipe's reading end is closed before anything is written
    with subprocess.Popen([program, "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
        assert run.wait(timeout=60) == 1
