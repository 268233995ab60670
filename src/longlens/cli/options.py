"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class WordsCommand(click.Command):
    """A command whose options take several words (`--include mean surprise`), and whose option names may be written
    with `_` for `-`, as in esm-extract."""

    # option -> pattern of the words that may follow it
    words: ClassVar[dict[str, str]] = {
        "--include": r"mean|per[-_]tok|bos|logits|surprise",
        "--layers": r"-?\d+|all",
        "--repr-layers": r"-?\d+|all",
    }

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each of its words."""
        out: list[str] = []
        current, pattern, has_value = "", "", False
        for arg in args:
            name, equals, value = arg.partition("=")
            if name.startswith("--") and len(name) > 2:
                name = name.replace("_", "-")
                current, pattern, has_value = (name, self.words.get(name, ""), bool(equals))
                if not pattern or equals:
                    out.append(f"{name}{equals}{value}")
                continue
            if pattern and re.fullmatch(pattern, arg):
                out.append(f"{current}={arg.replace('_', '-') if current == '--include' else arg}")
                has_value = True
                continue
            if pattern and not has_value:
                # no fitting word followed: the option itself reports the error
                out.append(f"{current}={arg}")
                pattern = ""
                continue
            pattern = ""
            out.append(arg)
        if pattern and not has_value:
            out.append(current)
        return super().parse_args(ctx, out)


class LayerNumber(click.ParamType):  # type: ignore[type-arg]
    """A whole number, or "all"."""

    name = "layer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "all" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"expected a whole number or all, got {value!r}", param, ctx)


threads_option = click.option(
    "--threads", type=click.IntRange(min=1), default=None,
    help="CPU threads. [default: OMP_NUM_THREADS, or all cores that the process may use]",
)  # fmt: skip


_MODEL = "tiny, antiberty, a folder, a file or a name on the Hugging Face hub; see `longlens models`."


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--model, --dtype, --device, --threads."""
    return _with_model(click.option("-m", "--model", default="tiny", show_default=True, help=_MODEL), function)


def several_models_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, where --model may be given several times."""
    more = f"{_MODEL} Several, each after its own --model: their mean too, as ESM-1v's five are used."
    several = click.option("-m", "--model", multiple=True, default=["tiny"], show_default=True, help=more)
    return _with_model(several, function)


_device_options: list[Decorator] = [
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
                 show_default=True, help="auto: float32 on a CPU, bfloat16 on a GPU."),
    click.option("--device", default="auto", show_default=True),
    threads_option,
]  # fmt: skip


def _with_model(model: Decorator, function: Callable[..., Any]) -> Callable[..., Any]:
    return _wrapped([model, *_device_options], function)


def _wrapped(decorators: Sequence[Decorator], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with options, in the order of the help."""
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def table_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--output and --format of a table that goes to standard output without a file."""
    wrap: list[Decorator] = [
        click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write: .csv, .tsv, .parquet or "
                     ".json. [default: standard output]"),
        click.option("--format", "format_", type=click.Choice(["csv", "tsv", "parquet", "json"]), default=None,
                     help="Of standard output. [default: csv]"),
    ]  # fmt: skip
    return _wrapped(wrap, function)


def text_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--context, --stride, --bos, --surprise, --input: how a model reads a text; then memory, device and method."""
    wrap: list[Decorator] = [
        click.option("--context", type=int, metavar="W", help="Tokens of a window. [default: the whole text]"),
        click.option("--stride", type=int, metavar="S", help="Tokens from one window to the next."),
        click.option("--bos/--no-bos", default=None, help="Whether a causal model gets its start token first. "
                     "[default: if its tokenizer has one]"),
        click.option("--surprise", "masking", type=click.Choice(["masked", "in-place"]), default=None,
                     help="Of a masked model: each token masked in turn, or one pass. [default: masked]"),
        click.option("--input", "kind", type=click.Choice(["auto", "text"]), default="auto", show_default=True,
                     help="text: also where the file looks like FASTA, with a first line of '>'."),
        max_memory_option,
        *_device_options,
        method_option,
    ]  # fmt: skip
    return _wrapped(wrap, function)


def reading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--structures, --min-plddt, --rare-as-x: how a model reads the proteins."""
    wrap: list[Decorator] = [
        click.option("--structures", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
                     help="For SaProt: structures (PDB, mmCIF), a folder of them, or a FASTA file of structure "
                     "letters; may be given several times."),
        click.option("--min-plddt", type=float, default=None,
                     help="Take the structure of a residue with a lower pLDDT as unknown (SaProt's authors: 70)."),
        click.option("--rare-as-x", is_flag=True, help="Read U, Z, O and B as X, as ProtBert's authors do."),
    ]  # fmt: skip
    return _wrapped(wrap, function)


method_option = click.option(
    "--method", default="exact", show_default=True, help="Method of attention; see `longlens methods`."
)

include_option = click.option(
    "--include", multiple=True, default=["mean"], metavar="WHAT...", show_default=True,
    type=click.Choice(["mean", "per-tok", "bos", "logits", "surprise"]),
    help="What to compute: mean, per-tok, bos, logits, surprise.",
)  # fmt: skip

layers_option = click.option(
    "--layers", "--repr-layers", multiple=True, type=LayerNumber(), default=[-1], metavar="N...", show_default=True,
    help="Layers of which vectors are computed; 0 is the embedding, -1 the last; all.",
)  # fmt: skip

surprise_option = click.option(
    "--surprise", type=click.Choice(["wt", "masked"]), default="wt", show_default=True,
    help="wt: one pass; masked: each residue masked in turn.",
)  # fmt: skip

max_memory_option = click.option(
    "--max-memory", default=None, help="Memory limit of the whole process. [default: 80 % of free memory]"
)

tokens_per_batch_option = click.option(
    "--tokens-per-batch", "--toks-per-batch", default="auto", show_default=True, help="Tokens computed at a time."
)

min_separation_option = click.option(
    "--min-separation", type=int, default=6, show_default=True,
    help="Leave out pairs that are closer than this in the sequence.",
)  # fmt: skip

on_error_option = click.option(
    "--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True,
    help="What to do with a record that cannot be read.",
)  # fmt: skip


def as_paths(names: Sequence[str]) -> list[str | Path]:
    """Arguments as paths of files, never as sequences; "-" stays standard input."""
    return [name if name == "-" else Path(name) for name in names]


def choose_threads(threads: int | None) -> int:
    """What --threads means."""
    from longlens.jobs.limits import default_threads

    return default_threads() if threads is None else threads


def warn_of_default_model() -> None:
    """Warn on standard error if the model is the default."""
    context = click.get_current_context()
    if context.get_parameter_source("model") == click.core.ParameterSource.DEFAULT:
        click.echo(
            "longlens: warning: no --model was named, so `tiny` is used: a small model to try commands with, not one "
            "for research",
            err=True,
        )
