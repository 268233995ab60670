"""`longlens look`: what a model attends to in proteins or a text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longlens.cli.options import WordsCommand, method_option, model_options, readable_input

if TYPE_CHECKING:
    from collections.abc import Iterable

    from longlens.io.survey import Survey
    from longlens.jobs.look import LookOptions, Unit


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers between commas: 0,5,-1."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"expected whole numbers between commas, such as 0,5,-1, got {value!r}", param, ctx)


class Places(click.ParamType):  # type: ignore[type-arg]
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
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--layers", multiple=True, type=Numbers(), metavar="N,...", help="From 0, or -1 the last. [default: all]")
@click.option("--heads", type=Numbers(), metavar="N,...", help="From 0, the same in every layer. [default: all]")
@click.option(
    "--collect",
    metavar="WHAT,...",
    help="Of entropy, effective_keys, log_sum_exp, distance, distance_spread, received, received_mean, received_max, "
    "column_entropy, neighbours, top_keys, top_queries, pooled, surprise. [default: entropy, distance, received, "
    "neighbours, top_keys, top_queries, pooled, and surprise where the model predicts]",
)
@click.option("--tokens", type=Numbers(), metavar="N,...", help="Whose partners are shown; a residue's number is its "
              "token's. [default: those that receive most]")  # fmt: skip
@click.option("--maps", type=Places(), metavar="LAYER.HEAD,...", help="Whose maps are shown. [default: those that "
              "stand out]")  # fmt: skip
@click.option("--record", multiple=True, metavar="ID", help="Only this record of the FASTA; may be given again.")
@click.option("--pool", default=256, show_default=True, type=click.IntRange(min=1), help="Cells along a map, at most.")
@click.option("--top", default=8, show_default=True, type=click.IntRange(min=1), help="Partners kept of each token.")
@click.option("--input", "kind", type=click.Choice(["auto", "proteins", "text"]), default="auto", show_default=True,
              help="auto: proteins where the file begins with '>'.")  # fmt: skip
@click.option("--figures/--no-figures", default=True, show_default=True)
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
    model: str,
    dtype: str,
    device: str,
    method: str,
) -> None:
    """Look at what a model attends to: tables and figures for each protein of a FASTA file, or for one text.

    Proteins take a model of proteins, a text a transformers model (a folder or a name on the hub). OUTPUT gets a folder
    for each sequence. Killed at any moment, the same command goes on with the sequences that are left.
    """
    from longlens.errors import InputError
    from longlens.io.results import ResultFolder
    from longlens.io.texts import looks_like_fasta
    from longlens.jobs import look as job

    options = job.LookOptions(
        layers=tuple(layer for part in layers for layer in part) or None, heads=heads,
        collect=None if collect is None else tuple(part.strip().replace("-", "_") for part in collect.split(",")),
        tokens=tokens or (), maps=maps or (), pool=pool, links=top, method=method, figures=figures,
    )  # fmt: skip
    name = _name_of(model)
    with readable_input([source]) as paths:
        proteins = kind == "proteins" or (kind == "auto" and looks_like_fasta(paths[0]))
        prepare = _proteins if proteins else _text
        if not proteins and record:
            raise click.UsageError("--record chooses among the records of a FASTA file; a text is one sequence")
        asked = prepare(paths[0], model, dtype, device, options, record, name)
        try:
            with closing(ResultFolder(output, asked.identity, [], {})) as folder, _progress(asked.survey) as report:
                job.look(asked.units, folder, asked.options, report)
        except OSError as error:
            raise InputError(
                f"{output}: cannot be written ({error.strerror or error}); sequences that are done stay: once there "
                "is room, the same command goes on"
            ) from error
    _summary(asked, output)


@dataclass(frozen=True)
class _Asked:
    """A job before it starts: everything that can be wrong has been found."""

    units: Iterable[Unit]
    survey: Survey
    options: LookOptions
    identity: dict[str, Any]
    name: str


def _proteins(
    path: str, model: str, dtype: str, device: str, options: LookOptions, records: tuple[str, ...], name: str
) -> _Asked:
    from longlens.cli.options import load_model
    from longlens.io.survey import survey
    from longlens.jobs import look as job

    found = job.chosen_records(survey([path]), records)
    loaded = load_model(model, dtype, device)
    settled = job.protein_options(loaded, options)
    job.refuse_unfit(loaded, found, settled)
    identity = job.identity(loaded, found, settled, name)
    return _Asked(job.protein_units(loaded, path, found, settled, name), found, settled, identity, name)


def _text(
    path: str, model: str, dtype: str, device: str, options: LookOptions, records: tuple[str, ...], name: str
) -> _Asked:
    from longlens.errors import InputError
    from longlens.hf.texts import load_text_model
    from longlens.io.texts import read_text
    from longlens.jobs import look as job

    text = read_text(path)
    if model in ("tiny", "antiberty"):
        raise InputError(
            f"{Path(path).name}: expected --model to name a model of text (a transformers folder or hub name), got "
            f"{model}, a model of proteins; a protein's file begins with a line such as >name"
        )
    loaded = load_text_model(model, dtype=dtype, device=device)
    tokens = loaded.tokenize(text, Path(path).name)
    settled = job.text_options(loaded, options)
    job.refuse_tokens(settled, len(tokens), Path(path).name)
    found = job.text_survey(text, Path(path).name, len(tokens))
    identity = job.identity(loaded.model, found, settled, name)
    return _Asked([job.text_unit(loaded, tokens, found, settled, name)], found, settled, identity, name)


def _name_of(model: str) -> str:
    """How figures name a model: a folder or file by its own name."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


@contextmanager
def _progress(found: Survey) -> Iterator[Callable[[Unit], None]]:
    """A bar on a terminal; nothing in a pipe."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("look", total=len(found.entries))
        yield lambda unit: bar.update(task, advance=1, description=unit.name)


def _summary(asked: _Asked, output: Path) -> None:
    """What was done, on standard output."""
    lengths = [entry.length for entry in asked.survey.entries]
    click.echo(
        f"model       {asked.name}: layers {_listed(asked.options.layers)}, heads {_listed(asked.options.heads)}"
    )
    click.echo(f"sequences   {len(lengths):,} (longest {max(lengths):,})")
    if not asked.options.surprise:
        click.echo("surprise    none: not asked for, or the model has no head that predicts")
    for folder in sorted(path for path in output.iterdir() if path.is_dir() and not path.name.startswith(".")):
        click.echo(f"results     {folder}")


def _listed(numbers: tuple[int, ...] | None) -> str:
    return ",".join(map(str, numbers or ()))
