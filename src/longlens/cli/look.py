"""`longlens look`: tables and figures of what a model attends to in proteins or a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longlens.cli.options import (
    WordsCommand,
    choose_threads,
    max_memory_option,
    method_option,
    model_options,
    on_error_option,
    warn_of_default_model,
)
from longlens.cli.progress import shown_progress

if TYPE_CHECKING:
    from longlens.jobs.looks import Looks


class IntegerList(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers separated by commas: 0,5,-1; for layers also "all"."""

    name = "numbers"

    def __init__(self, *, all_: bool = False) -> None:
        self._all = all_

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if self._all and value == "all":
            return ()
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"expected whole numbers separated by commas, such as 0,5,-1, got {value!r}", param, ctx)


class LayerHeadList(click.ParamType):  # type: ignore[type-arg]
    """Layers and heads: 3.7,5.2."""

    name = "layer.head"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            pairs = [part.split(".") for part in value.split(",")]
            return tuple((int(layer), int(head)) for layer, head in pairs)
        except ValueError:
            self.fail(f"expected layers and heads such as 3.7,5.2, got {value!r}", param, ctx)


@click.command(cls=WordsCommand)
@click.argument("source", metavar="FASTA|TEXT|-")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--layers", multiple=True, type=IntegerList(all_=True), metavar="N,...",
              help="Layers from 0; -1 is the last; all. [default: all]")  # fmt: skip
@click.option(
    "--heads", type=IntegerList(), metavar="N,...", help="Heads from 0, the same in every layer. [default: all]"
)
@click.option(
    "--collect",
    metavar="WHAT,...",
    help="Of entropy, effective_keys, log_sum_exp, distance, distance_spread, received, received_mean, received_max, "
    "column_entropy, neighbours, top_keys, top_queries, pooled, surprise. [default: entropy, distance, received, "
    "neighbours, top_keys, top_queries, pooled, and surprise where the model predicts]",
)
@click.option("--tokens", type=IntegerList(), metavar="N,...", help="Tokens whose partners are shown; a residue has "
              "the number of its token. [default: those that receive most]")  # fmt: skip
@click.option("--maps", type=LayerHeadList(), metavar="LAYER.HEAD,...", help="Heads whose maps are shown. [default: "
              "those that stand out]")  # fmt: skip
@click.option("--record", multiple=True, metavar="ID", help="Only this record of the FASTA file; may be repeated.")
@click.option("--pool", default=256, show_default=True, type=click.IntRange(min=1), help="The most cells along a map.")
@click.option(
    "--top",
    default=8,
    show_default=True,
    type=click.IntRange(min=1),
    help="Number of strongest partners that are kept for each token.",
)
@click.option("--input", "kind", type=click.Choice(["auto", "proteins", "text"]), default="auto", show_default=True,
              help="auto: proteins where the file looks like FASTA.")  # fmt: skip
@click.option("--figures/--no-figures", default=True, show_default=True)
@max_memory_option
@on_error_option
@model_options
@method_option
def look(
    source: str,
    output: Path,
    layers: tuple[tuple[int, ...], ...],
    heads: tuple[int, ...] | None,
    collect: str | None,
    tokens: tuple[int, ...] | None,
    maps: tuple[tuple[int, int], ...] | None,
    record: tuple[str, ...],
    pool: int,
    top: int,
    kind: str,
    figures: bool,
    max_memory: str | None,
    on_error: str,
    model: str,
    dtype: str,
    device: str,
    threads: int | None,
    method: str,
) -> int:
    """Make tables and figures of what a model attends to, for each protein of a FASTA file or for one text.

    Proteins need a protein language model, a text a model of transformers (a folder or a name on the hub). OUTPUT
    receives a folder for each sequence. An interrupted run continues when the same command is given again. Exit
    status: 0 done, 2 wrong input, 3 done except for skipped records, 130 interrupted.
    """
    from longlens.jobs.look_job import look as run_look
    from longlens.jobs.runner import SKIPPED

    warn_of_default_model()
    with shown_progress() as progress:
        looks = run_look(
            source if source == "-" else Path(source), model=model, output=output,
            layers=tuple(layer for part in layers for layer in part) if all(layers) and layers else None, heads=heads,
            collect=None if collect is None else [part.strip().replace("-", "_") for part in collect.split(",")],
            tokens=tokens or (), maps=maps or (), record=record, pool=pool, top=top, input=kind, figures=figures,
            max_memory=max_memory, on_error=on_error, method=method, dtype=dtype, device=device,
            threads=choose_threads(threads), progress=progress,
        )  # fmt: skip
    _summary(looks)
    return SKIPPED if looks.skipped else 0


def _summary(looks: Looks) -> None:
    """Print a summary on standard output."""
    rows = [row for row in looks.table if row["problem"] is None]
    lengths = [row["length"] for row in rows]
    options = looks.manifest["job"]["options"]
    click.echo(f"model       {looks.model}: layers {_listed(options['layers'])}, heads {_listed(options['heads'])}")
    click.echo(f"sequences   {len(lengths):,} (longest {max(lengths):,})")
    if "surprise" not in options["collect"]:
        click.echo("surprise    none: not asked for, or the model has no head that predicts")
    if looks.skipped:
        click.echo(f"skipped     {len(looks.skipped):,} records: see `skipped` in {looks.folder / 'manifest.json'}")
    for row in rows:
        click.echo(f"results     {looks.folder / row['folder']}")


def _listed(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))
