"""The group: help, errors, interruption, a reader that goes away."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest

import longlens.cli.main as under_test
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
