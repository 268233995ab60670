"""`longlens methods`: the registry as a table or as JSON. Needs no torch."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table

from longlens.ops.registry import METHOD_INFOS, MethodInfo

LEGEND = """\
exact   softmax attention over all pairs, over the pairs of the method's
        pattern, or no: an approximation; softcap and sinks go with all that
        are not approximations
masks   any: rules, tensors, additive biases; keys: padding and packing only
grad    1st: first derivatives; 2nd: second derivatives too
memory  order in the length N, as for time; other letters are its parameters"""

# widths of the table without and with its papers, in characters; a narrower terminal wraps lines, nothing is cut off
NARROW, WIDE = 78, 120


def describe(entry: MethodInfo) -> dict[str, str]:
    """The cells of one method, by heading."""
    return {
        "method": entry.name,
        "family": entry.family,
        "exact": entry.exact,
        "causal": "yes" if entry.causal else "no",
        "masks": "any" if entry.masks and entry.bias else "rules" if entry.masks else "keys",
        "grad": "2nd" if entry.second_derivatives else "1st",
        "memory": entry.memory,
        "time": entry.time,
        "paper": entry.paper.replace("; ", "\n"),
    }


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object for each method, with every capability.")
def methods(as_json: bool) -> None:
    """List the methods of attention and what each can do.

    On a terminal narrower than 120 columns the papers are listed below the table.
    """
    if as_json:
        rows = [{key: value for key, value in asdict(entry).items() if key != "path"} for entry in METHOD_INFOS]
        click.echo(json.dumps(rows, indent=2))
        return
    console = Console(highlight=False)
    room = console.width if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
    console.width = max(room, NARROW)
    headings = list(describe(METHOD_INFOS[0]))
    tables = [headings] if room >= WIDE else [headings[:-1], ["method", "paper"]]
    with console.capture() as captured:
        for chosen in tables:
            console.print(_table(chosen))
            console.print()
    # rich pads each line with blanks to the table's width
    lines = [line.rstrip() for line in captured.get().splitlines()]
    click.echo("\n".join([*lines, LEGEND]))


def _table(headings: list[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=heading != "paper")
    for entry in METHOD_INFOS:
        description = describe(entry)
        table.add_row(*(description[heading] for heading in headings))
    return table
