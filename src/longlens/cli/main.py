"""The `longlens` command. A command's module is imported when the command runs, so that help is quick."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from longlens import __version__
from longlens.cli.aliases import ALIASES, nearest
from longlens.errors import LonglensError

# name -> module and object of the command, and its line in `longlens --help`
COMMANDS = {
    "compare-models": ("longlens.cli.compare_models:compare_models", "How two language models differ on a text."),
    "conformance": ("longlens.cli.conformance:conformance", "Run an attention function through the conformance suite."),
    "contacts": ("longlens.cli.contacts:contacts", "Contact maps of proteins, in linear memory."),
    "context": ("longlens.cli.context:context", "Which stretches carried a prediction, by hiding them."),
    "doctor": ("longlens.cli.doctor:doctor", "Show what is installed and what is fast on this machine."),
    "embed": ("longlens.cli.embed:embed", "Proteins to vectors, logits and surprise, in linear memory."),
    "explain": ("longlens.cli.explain:explain", "Show the path that a call would take, and its memory."),
    "finetune": ("longlens.cli.finetune:finetune", "Learn a property of proteins from examples, and measure it."),
    "look": ("longlens.cli.look:look", "Tables and figures of what a model attends to."),
    "methods": ("longlens.cli.methods:methods", "List the methods of attention and what each can do."),
    "models": ("longlens.cli.models:models", "List the models of proteins and what each can do."),
    "paint": ("longlens.cli.paint:paint", "Numbers of residues onto a structure."),
    "plan": ("longlens.cli.plan:plan", "Predict the memory, time and batches of embedding a file."),
    "predict": ("longlens.cli.predict:predict", "Apply what finetune learned to other proteins."),
    "score": ("longlens.cli.score:score", "Zero-shot effects of variants from a model's predictions."),
    "surprise": ("longlens.cli.surprise:surprise", "How surprised a language model is by a text, token by token."),
    "train": ("longlens.cli.train:train", "Train a protein language model by masked language modelling."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they run, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in alphabetical order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None if there is no command of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take the names of other tools too, under ours in usage and messages; name the nearest for one mistyped."""
        word = args[0].replace("_", "-")
        name = ALIASES[word][0] if word in ALIASES else word
        if name in COMMANDS or word.startswith("-"):
            return super().resolve_command(ctx, [name, *args[1:]])
        close = nearest(word, [*COMMANDS, *ALIASES])
        meant = f"{ALIASES[close][0]} (elsewhere {close})" if close in ALIASES else close
        hint = f" Did you mean {meant}?" if meant else " See `longlens --help`."
        raise click.UsageError(f"No such command '{args[0]}'.{hint}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])
        with formatter.section("Names of other tools"):
            formatter.write_dl([(name, f"{ours} (as in {source})") for name, (ours, source) in ALIASES.items()])


# `_` for `-` in names of options and in their words, as other tools write them; commands inherit it
SETTINGS = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("_", "-")}


@click.group(cls=LazyGroup, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="longlens")
def cli() -> None:
    """Transformers over long proteins and texts in memory linear in their length, with a lens that shows what they
    attend to and how surprised they are.
    """


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted.

    If the reader of a pipe ends (`longlens methods | head -1`), click ends the command silently with 1.
    """
    try:
        code = cli.main(prog_name="longlens", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as stopped:
        # click replaces the exception of a job by its own and keeps the job's as the cause
        what = str(stopped.__cause__ or stopped)
        click.echo(f"longlens: {what or 'interrupted'}", err=True)
        sys.exit(130)
    except LonglensError as error:
        click.echo(f"longlens: {error}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
