"""What a refused command says."""

from __future__ import annotations

from click.testing import CliRunner

from longlens.cli.main import cli
from longlens.errors import InputError


def refused(*words: object) -> str:
    """The message of a command that is refused."""
    run = CliRunner().invoke(cli, [str(word) for word in words])
    assert run.exit_code != 0
    if isinstance(run.exception, SystemExit):
        assert run.exit_code == 2
        return run.output
    assert isinstance(run.exception, InputError)
    return str(run.exception)
