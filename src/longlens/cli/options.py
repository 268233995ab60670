"""Options that several commands share."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

if TYPE_CHECKING:
    from longlens.jobs.plan import Outputs
    from longlens.models.language_model import MaskedLM

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class WordsCommand(click.Command):
    """A command whose options of several words are given as `--include mean surprise`, and whose option names may be
    written with `_` for `-`, as esm-extract's users know them."""

    # option -> what may follow it
    words: ClassVar[dict[str, str]] = {
        "--include": r"mean|per[-_]tok|bos|logits|surprise",
        "--layers": r"-?\d+",
        "--repr-layers": r"-?\d+",
    }

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each of its words."""
        out: list[str] = []
        current, pattern, given = "", "", False
        for arg in args:
            name, equals, value = arg.partition("=")
            if name.startswith("--") and len(name) > 2:
                name = name.replace("_", "-")
                current, pattern, given = (name, self.words.get(name, ""), bool(equals))
                if not pattern or equals:
                    out.append(f"{name}{equals}{value}")
                continue
            if pattern and re.fullmatch(pattern, arg):
                out.append(f"{current}={arg.replace('_', '-') if current == '--include' else arg}")
                given = True
                continue
            if pattern and not given:
                # nothing fitting followed: let the option say so
                out.append(f"{current}={arg}")
                pattern = ""
                continue
            pattern = ""
            out.append(arg)
        if pattern and not given:
            out.append(current)
        return super().parse_args(ctx, out)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--model, --dtype, --device."""
    wrap: list[Decorator] = [
        click.option("-m", "--model", default="tiny", show_default=True, help="tiny, antiberty, a folder, a file or a "
                     "name on the Hugging Face hub."),
        click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
                     show_default=True, help="auto: float32 on a CPU, bfloat16 on a GPU."),
        click.option("--device", default="auto", show_default=True),
    ]  # fmt: skip
    for decorator in reversed(wrap):
        function = decorator(function)
    return function


method_option = click.option("--method", default="exact", show_default=True, help="Attention; see `longlens methods`.")


def load_model(model: str, dtype: str, device: str, max_memory: str | None = None) -> MaskedLM:
    """The model that the options name; with `max_memory`, refused before it is read where that alone takes more."""
    from longlens.models.pretrained import load

    if max_memory is not None:
        from longlens.jobs.memory import model_size, refuse_large_model

        refuse_large_model(model_size(model, dtype, device), max_memory)
    return load(model, dtype=dtype, device=device)


@contextmanager
def readable_input(paths: Sequence[str]) -> Iterator[list[str]]:
    """The paths as files that can be read twice: standard input ("-") is kept in a temporary file meanwhile."""
    if "-" not in paths:
        yield list(paths)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "standard input"
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield [str(copy) if path == "-" else path for path in paths]


def memory_limits(model: MaskedLM, outputs: Outputs, max_memory: str | None, tokens_per_batch: str) -> tuple[int, int]:
    """Bytes that a batch may take, and tokens to a batch. Raises `InputError`."""
    from longlens.errors import InputError
    from longlens.jobs.memory import batch_limit, process_bytes, total_limit
    from longlens.jobs.plan import token_budget

    total = total_limit(max_memory, model.device)
    on_cpu = model.device.type == "cpu"
    held = process_bytes() if on_cpu else sum(tensor.nbytes for tensor in model.state_dict().values())
    limit = batch_limit(total, held, model.device)
    if tokens_per_batch == "auto":
        return limit, token_budget(model, limit, outputs)
    if not tokens_per_batch.isdigit() or int(tokens_per_batch) < 1:
        raise InputError(f"expected --tokens-per-batch auto or a whole number, got {tokens_per_batch!r}")
    return limit, int(tokens_per_batch)
