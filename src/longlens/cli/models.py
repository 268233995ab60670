"""`longlens models`: the families that `longlens.load` serves, their published models, and what is not served."""

from __future__ import annotations

import json
import os
import sys

import click
from rich.console import Console
from rich.table import Table

LEGEND = """\
limit     the most residues of a protein; without one, memory alone limits it
contacts  own: the weights of its contact head come with it; fitted: after
          `longlens contacts fit`
Every model has embed, look, plan and finetune, and those with surprise have
context too.
Names with a / are fetched from the Hugging Face hub (pip install
'longlens[hub]'); a folder or file of such a model serves as well."""

# width of the table, in characters; a narrower terminal gets a list
WIDE = 120


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON: served models, and others with what serves them.")
def models(as_json: bool) -> None:
    """List the models that --model takes: sizes, limit, licence of the weights, and what each can do."""
    from longlens.models.families.listing import list_others, list_served

    served, others = list_served(), list_others()
    if as_json:
        click.echo(json.dumps({"served": served, "not_served": others}, indent=2))
        return
    console = Console(highlight=False)
    room = console.width if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
    lines = []
    if room >= WIDE:
        console.width = WIDE
        with console.capture() as captured:
            console.print(_table(served))
        lines += [line.rstrip() for line in captured.get().splitlines()]
    else:
        for row in served:
            lines.append(row["model"])
            lines += [f"    {name:10} {_cell(row, name)}" for name in row if name != "model" and row[name] is not None]
    notes = {str(row["note"]): str(row["model"]) for row in reversed(served) if row["note"]}
    said = [f"{model}: {note}" for note, model in reversed(notes.items())]
    lines += ["", LEGEND, "", *said, "", "not served by longlens.load:"]
    for other in others:
        how = "longlens.hf.attach serves it" if other["attach"] else "not by longlens.hf.attach either"
        lines.append(f"  {other['model']}: {other['reason']}; {how}")
    click.echo("\n".join(lines))


def _cell(row: dict[str, object], name: str) -> str:
    value = row[name]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: list[dict[str, object]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    names = [name for name in rows[0] if name not in ("note", "layers", "width", "heads")]
    for name in names:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row, name) for name in names))
    return table
