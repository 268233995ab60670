"""`longlens compare-models`: how the predictions of two language models differ on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from longlens.cli.options import WordsCommand, choose_threads, table_options, text_options
from longlens.cli.progress import shown_progress
from longlens.cli.summaries import nats, print_results

if TYPE_CHECKING:
    from longlens.jobs.comparisons import Comparison


@click.command(cls=WordsCommand)
@click.argument("model")
@click.argument("other")
@click.argument("text", metavar="TEXT|-")
@table_options
@text_options
def compare_models(
    model: str,
    other: str,
    text: str,
    output: Path | None,
    format_: str | None,
    context: int | None,
    stride: int | None,
    bos: bool | None,
    masking: str | None,
    kind: str,
    max_memory: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    method: str,
) -> int:
    """Compare the predictions of two language models of one tokenizer, MODEL (a) and OTHER (b), for each token of TEXT.

    The table has the surprise and entropy of both, the divergences KL(a||b) and KL(b||a), the difference of surprise
    (b - a) and whether both have the same first choice; a summary follows on standard output, or on standard error
    where the table is on standard output. Exit status: 0 done, 2 wrong input, 130 interrupted.
    """
    from longlens.jobs.compare_job import compare_models as run_compare

    with shown_progress() as progress:
        found = run_compare(
            model, other, text if text == "-" else Path(text), output=output, format=format_, context=context,
            stride=stride, bos=bos, masking=masking, input=kind, max_memory=max_memory, method=method,
            dtype=dtype, device=device, threads=choose_threads(threads), progress=progress,
        )  # fmt: skip
    print_results(found.data, _summary(found), output)
    return 0


def _summary(found: Comparison) -> list[tuple[str, str]]:
    numbers = found.summary

    def mean(name: str) -> str:
        return nats(numbers[f"mean_{name}"], numbers[f"mean_{name}_error"])

    return [
        ("a, b", f"{found.models[0]}, {found.models[1]}; {numbers['kind']}"),
        ("special tokens", numbers["special_tokens"]),
        ("tokens", f"{numbers['tokens']:,}"),
        ("surprise", f"a {mean('surprise_a')}, b {mean('surprise_b')}"),
        ("b - a", mean("difference")),
        ("KL(a||b)", mean("kl_ab")),
        ("KL(b||a)", mean("kl_ba")),
        ("first choice", f"the same for {numbers['same_first_choice']:.1%} of the tokens"),
    ]
