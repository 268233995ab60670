"""`longlens contacts`: contact maps of proteins; `longlens contacts fit`: a contact head for a model that has none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longlens.cli.options import load_model, memory_limits, model_options, readable_input

if TYPE_CHECKING:
    from torch import Tensor

    from longlens.io.survey import Entry, Survey
    from longlens.models.language_model import MaskedLM

# finished, but records were skipped
SKIPPED = 3


class _MapByDefault(click.Group):
    """`longlens contacts FASTA` is `longlens contacts map FASTA`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `map` before anything that is no command of the group."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["map", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_MapByDefault)
def contacts() -> None:
    """Contact maps of proteins from a model's attention: `longlens contacts FASTA... -o OUTPUT`.

    `map` (which need not be written) makes the maps; `fit` makes a contact head for a model that has none. `longlens
    contacts map --help` lists the options.
    """


@contacts.command("map")
@click.argument("fasta", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--format", "format_", type=click.Choice(["parquet", "npz", "zarr"]), default="parquet",
              show_default=True, help="parquet, npz: chosen pairs; zarr: the whole map.")  # fmt: skip
@click.option("--threshold", type=float, default=None, help="Keep pairs of at least this probability. [default: 0.3]")
@click.option("--top", type=int, default=None, help="Keep each residue's K strongest partners.")
@click.option("--band", type=int, default=None, help="Keep pairs at most W apart.")
@click.option("--min-separation", type=int, default=6, show_default=True, help="Leave out pairs closer than this.")
@click.option("--array-dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True,
              help="Of whole maps.")  # fmt: skip
@click.option("--head", type=click.Path(path_type=Path), default=None, help="A contact head made by `contacts fit`.")
@click.option("--figure", is_flag=True, help="Also draw each map.")
@click.option("--max-memory", default=None, help="Such as 16G. [default: 80 % of what is free]")
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True,
              help="What to do with a record that cannot be read.")  # fmt: skip
@model_options
def map_(
    fasta: tuple[str, ...],
    output: Path,
    format_: str,
    threshold: float | None,
    top: int | None,
    band: int | None,
    min_separation: int,
    array_dtype: str,
    head: Path | None,
    figure: bool,
    max_memory: str | None,
    on_error: str,
    model: str,
    dtype: str,
    device: str,
) -> int:
    """Contact probabilities of the proteins of FASTA files ("-" is standard input), by ESM-2's contact head.

    A map whose T x T numbers fit in memory is made whole, a longer one a stretch of rows at a time, in memory linear in
    its length; the table says which. Killed at any moment, the same command goes on where it stopped. Exit: 0 done,
    2 wrong input, 3 done but for skipped records.
    """
    from longlens.errors import InputError
    from longlens.io.results import ResultFolder
    from longlens.io.survey import survey
    from longlens.jobs import contacts as job
    from longlens.jobs.plan import Outputs

    if threshold is None and top is None and band is None and format_ != "zarr":
        threshold = 0.3
    options = job.ContactOptions(
        format=format_, threshold=threshold, top=top, band=band, separation=min_separation, array_dtype=array_dtype,
        figure=figure,
    )  # fmt: skip
    with readable_input(fasta) as paths:
        found = survey(paths, skip_errors=on_error == "skip")
        loaded = load_model(model, dtype, device, max_memory)
        if head is not None:
            from longlens.jobs.fit_contacts import load_head

            load_head(loaded, head)
        # refused here, before a folder is made
        loaded.contact_regression()
        draw = _drawing(loaded) if figure else None
        limit, _ = memory_limits(loaded, Outputs(0, 0), max_memory, "auto")
        identity = job.identity(loaded, found, options)
        job.refuse_too_long(loaded, found, limit)
        with _progress(found) as report:
            try:
                with closing(ResultFolder(output, identity, [], {"memory": limit})) as folder:
                    job.contacts(loaded, paths, found, options, folder, draw, report)
            except OSError as error:
                raise InputError(
                    f"{output}: cannot be written ({error.strerror or error}); nothing is lost: once there is room, "
                    "the same command goes on"
                ) from error
    _summary(found, output)
    return SKIPPED if found.skipped else 0


@contacts.command("fit")
@click.argument("structures", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The head, a .safetensors file.")
@click.option("--fasta", type=click.Path(path_type=Path), default=None,
              help="The proteins of contact lists (structures bring their own).")  # fmt: skip
@click.option("--strength", type=float, default=0.15, show_default=True, help="C of the L1 penalty; less is sparser.")
@click.option("--min-separation", type=int, default=6, show_default=True, help="Pairs closer than this do not count.")
@click.option("--negatives", type=int, default=20_000, show_default=True, help="Pairs without contact taken from each "
              "protein at most.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@model_options
def fit(
    structures: tuple[str, ...],
    output: Path,
    fasta: Path | None,
    strength: float,
    min_separation: int,
    negatives: int,
    seed: int,
    model: str,
    dtype: str,
    device: str,
) -> None:
    """Fit a contact head: logistic regression with an L1 penalty on a model's attention (Rao et al. 2020).

    STRUCTURES are .pdb or .cif files (contact: C-beta atoms less than 8 Angstrom apart), or tables (.csv, .tsv) of the
    columns id, i, j (residues from 1), whose proteins --fasta gives. Twenty proteins are enough to begin with. Needs
    the extra `fit`.
    """
    from longlens.jobs import fit_contacts as job

    examples = job.read_examples([Path(name) for name in structures], fasta)
    loaded = load_model(model, dtype, device)
    options = job.FitOptions(strength=strength, separation=min_separation, negatives=negatives, seed=seed)
    fitted = job.fit_head(loaded, examples, options)
    job.save_head(loaded, fitted, output)
    click.echo(f"proteins    {len(examples):,}")
    click.echo(f"pairs       {fitted.contacts:,} contacts, {fitted.others:,} others")
    click.echo(f"heads used  {int((fitted.regression.weight != 0).sum())} of {fitted.regression.weight.numel()}")
    for number, part in enumerate(fitted.precision):
        spread = f", {part.lowest:.2f} to {part.highest:.2f} over {part.proteins} proteins" if part.proteins > 1 else ""
        click.echo(
            f"{'' if number else 'precision':<11} {part.mean:.2f} of the L strongest pairs at least {part.separation} "
            f"apart (chance {part.chance:.2f}{spread})"
        )
    if fitted.held_out:
        click.echo("            of proteins held out: each is predicted by a head fitted to others")
    else:
        click.echo("            of the proteins fitted to, which flatters the head: fit to several different proteins")
    click.echo(f"head        {output}")


def _drawing(model: MaskedLM) -> Callable[[Tensor, Entry, Path], None]:
    """What draws a map's cells. Asked for early, so that a missing package is said at once."""
    from longlens.report.contacts import draw_contacts

    def draw(cells: Tensor, entry: Entry, path: Path) -> None:
        draw_contacts(cells, entry.length, f"{entry.id}, {entry.length:,} residues", Path(model.source).name, path)

    return draw


@contextmanager
def _progress(found: Survey) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; nothing in a pipe."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    total = sum(entry.length for entry in found.entries)
    counted = TextColumn("{task.completed:,.0f} of {task.total:,.0f} residues")
    columns: list[Any] = [TextColumn("contacts"), BarColumn(), counted, TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("contacts", total=total)
        yield lambda done: bar.update(task, completed=done)


def _summary(found: Survey, output: Path) -> None:
    """What was done, on standard output."""
    import pyarrow.parquet as pq

    from longlens.jobs.plan import peak_memory
    from longlens.ops.explain import format_bytes

    table = pq.read_table(output / "index.parquet").to_pydict()
    lengths = [entry.length for entry in found.entries]
    kept = sum(form == "kept" for form in table["form"])
    click.echo(f"proteins    {len(lengths):,} (longest {max(lengths):,} residues)")
    click.echo(f"pairs       {sum(count or 0 for count in table['pairs']):,}")
    click.echo(f"form        {len(lengths) - kept:,} maps made whole, {kept:,} in linear memory")
    if found.skipped:
        click.echo(f"skipped     {len(found.skipped):,} records: see `problem` in the table")
    click.echo(f"peak memory {format_bytes(peak_memory())} for the whole process, PyTorch among it")
    click.echo(f"results     {output / 'index.parquet'}")
