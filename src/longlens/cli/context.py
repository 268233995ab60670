"""`longlens context`: which stretches of the input carried a prediction, measured by prediction error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from longlens.cli.options import (
    WordsCommand,
    choose_threads,
    max_memory_option,
    model_options,
    on_error_option,
    warn_of_default_model,
)
from longlens.cli.progress import shown_progress
from longlens.cli.summaries import counted


class WholeOrAll(click.ParamType):  # type: ignore[type-arg]
    """A whole number of at least 1, or "all"."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "all" or isinstance(value, int):
            return value
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"expected a whole number of at least 1, or all, got {value!r}", param, ctx)
        return number


class Stretches(click.ParamType):  # type: ignore[type-arg]
    """A width, ranges, or a file of ranges, as the user wrote it."""

    name = "stretches"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from longlens.errors import InputError
        from longlens.jobs.context_call import given_spans

        try:
            given_spans(value)
        except InputError as error:
            self.fail(str(error), param, ctx)
        return str(value)


@click.command(cls=WordsCommand)
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path, allow_dash=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
@click.option("--targets", default=None, help="Tokens that are explained: 27, K27, 10-20, a word; separated by "
              "commas. [default: the most surprising]")  # fmt: skip
@click.option(
    "--most-surprising", type=click.IntRange(1), default=4, show_default=True, help="How many, without --targets."
)
@click.option("--spans", type=Stretches(), default=None,
              help="Stretches to hide: a width, ranges such as 10-20,40-60, or a BED file. "
              "[default: a width of 4, or of a 64th of the sequence]")  # fmt: skip
@click.option("--exact", type=WholeOrAll(), default=8, show_default=True, help="Stretches that are hidden in truth for "
              "each target, the strongest by the estimate; all.")  # fmt: skip
@click.option(
    "--halve",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="How many of them are halved, down to one token.",
)
@click.option("--curve", type=click.IntRange(0), default=64, show_default=True,
              help="Tokens of the curve of surprise by context; 0: none.")  # fmt: skip
@click.option("--input", "kind", type=click.Choice(["auto", "proteins", "text"]), default="auto", show_default=True,
              help="auto: proteins where the file looks like FASTA.")  # fmt: skip
@click.option("--figures/--no-figures", default=True, show_default=True)
@click.option("--tokens-per-batch", "--toks-per-batch", type=click.IntRange(1), default=16_384, show_default=True)
@on_error_option
@max_memory_option
@model_options
def context(
    source: Path,
    output: Path,
    targets: str | None,
    most_surprising: int,
    spans: str | None,
    exact: int | str,
    halve: int,
    curve: int,
    kind: str,
    figures: bool,
    tokens_per_batch: int,
    on_error: str,
    max_memory: str | None,
    model: str,
    dtype: str,
    device: str,
    threads: int | None,
) -> int:
    """Which stretches of INPUT, a FASTA file or a text ("-" is standard input), carried the prediction of some of its
    residues or tokens: stretches are hidden from every query in every layer, and the surprise is computed again.

    The effect of every token and stretch is estimated to first order, and exact values are computed for the strongest.
    Exit status: 0 done, 2 wrong input, 3 done except for skipped records. Interrupted, the same command continues.
    """
    from longlens.jobs.context_call import context as run_context
    from longlens.jobs.runner import SKIPPED

    warn_of_default_model()
    with shown_progress() as progress:
        found = run_context(
            "-" if str(source) == "-" else source, model=model, output=output,
            targets=targets, most_surprising=most_surprising, spans=spans,
            exact=exact, halve=halve, curve=curve, input=kind, figures=figures, tokens_per_batch=tokens_per_batch,
            on_error=on_error, max_memory=max_memory, dtype=dtype, device=device, threads=choose_threads(threads),
            progress=progress,
        )  # fmt: skip
    forward, backward = (sum(row[name] for row in found.passes) for name in ("forward", "backward"))
    click.echo(
        f"{output}: {counted(len(found), 'sequence')}, {counted(forward, 'forward pass', 'es')} and "
        f"{counted(backward, 'backward pass', 'es')}"
    )
    return SKIPPED if found.skipped else 0
