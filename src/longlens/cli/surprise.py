"""`longlens surprise`: how surprised a language model is by a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from longlens.cli.options import WordsCommand, choose_threads, table_options, text_options
from longlens.cli.progress import shown_progress
from longlens.cli.summaries import nats, number, print_results

if TYPE_CHECKING:
    from longlens.jobs.surprises import Surprise


@click.command(cls=WordsCommand)
@click.argument("text", metavar="TEXT|-")
@click.option("-m", "--model", required=True, help="A transformers folder, or a name on the Hugging Face hub.")
@table_options
@click.option("--by", type=click.Choice(["token", "word", "line"]), default="token", show_default=True)
@click.option("--unit", type=click.Choice(["nats", "bits"]), default="nats", show_default=True)
@click.option("--figure", is_flag=True, help="Also draw surprise along the text, beside the output as .png.")
@text_options
def surprise(
    text: str,
    model: str,
    output: Path | None,
    by: str,
    unit: str,
    format_: str | None,
    context: int | None,
    stride: int | None,
    bos: bool | None,
    masking: str | None,
    figure: bool,
    kind: str,
    max_memory: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    method: str,
) -> int:
    """Compute how surprised a causal or masked language model is by the tokens of a text.

    The table has a row for each token, word or line; a summary follows on standard output, or on standard error where
    the table is on standard output. The whole text is the context, in linear memory; a text with more tokens than the
    model has positions is refused unless --context and --stride say how to read it. An interrupted run continues when
    the same command is given again. Exit status: 0 done, 2 wrong input, 130 interrupted.
    """
    from longlens.jobs.surprise_job import surprise as run_surprise

    with shown_progress() as progress:
        found = run_surprise(
            text if text == "-" else Path(text), model=model, output=output, by=by, unit=unit, format=format_,
            context=context, stride=stride, bos=bos, masking=masking, figure=figure, input=kind,
            max_memory=max_memory, method=method, dtype=dtype, device=device, threads=choose_threads(threads),
            progress=progress,
        )  # fmt: skip
    drawn = [("figure", str(output.with_suffix(".png")))] if figure and output is not None else []
    print_results(found.data, [*_summary(found), *drawn], output)
    return 0


def _summary(found: Surprise) -> list[tuple[str, str]]:
    numbers = found.summary
    windows = numbers["context"] if numbers["stride"] is None else (
        f"windows of {numbers['context']:,} tokens, {numbers['stride']:,} from one to the next"
    )  # fmt: skip
    tokens = f"{numbers['tokens']:,}"
    if numbers["predicted"] < numbers["tokens"]:
        tokens += f" ({numbers['tokens'] - numbers['predicted']:,} without a prediction: no token is before)"
    lines = [
        ("model", f"{found.model}, {numbers['kind']}"),
        ("special tokens", numbers["special_tokens"]),
        ("context", windows),
        ("tokens", tokens),
        ("bytes", f"{numbers['bytes']:,}"),
        ("bits per byte", number(numbers["bits_per_byte"], 4)),
        ("perplexity", f"{number(numbers['perplexity'], 2)} per token"),
        ("excess", f"{nats(numbers['mean_excess'], numbers['mean_excess_error'])}: surprise beyond what the model "
         "expected"),
    ]  # fmt: skip
    if numbers["method"] != "exact":
        lines.append(("method", numbers["method"]))
    if numbers["word_correction"] is not None:
        lines.append(("correction", numbers["word_correction"]))
    return lines
