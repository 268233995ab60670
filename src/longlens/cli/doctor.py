"""`longlens doctor`: what is installed, what this machine has, and what is fast on it."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from longlens.cli.wrapping import wrap_lines

# something keeps commands from running; 2 means wrong usage, as for all commands
PROBLEMS = 1


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Show what is installed, what this machine has, and what is fast on it.

    Prints versions and extras, with the command that adds a missing one; the processor, memory and GPUs; the speed of
    matrix products and attention by dtype, measured now; the path that typical calls of attention would take; the
    models that need no download; and what is wrong or would help. Needs no network and takes a few seconds. The text
    is what a report of a bug should contain.

    Exit status: 0 all is well, 1 something keeps commands from running, 2 wrong usage.
    """
    import longlens

    found = longlens.doctor()
    click.echo(json.dumps(asdict(found), indent=2) if as_json else wrap_lines(str(found)))
    return PROBLEMS if found.problems else 0
