"""`longlens contacts`: contact maps of proteins; `fit`: a contact head; `evaluate`: precision beside structures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from longlens.cli.options import (
    as_paths,
    choose_threads,
    max_memory_option,
    min_separation_option,
    model_options,
    on_error_option,
    warn_of_default_model,
)
from longlens.cli.progress import shown_progress
from longlens.cli.summaries import counted

if TYPE_CHECKING:
    from longlens.jobs.contact_maps import ContactMaps
    from longlens.jobs.fit_contacts import FittedHead


class _MapByDefault(click.Group):
    """`longlens contacts FASTA` is `longlens contacts map FASTA`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert `map` before an argument that is not a command of the group."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["map", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_MapByDefault)
def contacts() -> None:
    """Contact maps of proteins from a model's attention: `longlens contacts FASTA... -o OUTPUT`.

    `map` (the default) makes the maps; `fit` fits a contact head for a model that has none; `evaluate` compares maps
    with structures. `longlens contacts map --help` lists the options.
    """


@contacts.command("map")
@click.argument("fasta", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--format", "format_", type=click.Choice(["parquet", "npz", "rr", "zarr"]),
              default="parquet", show_default=True,
              help="parquet, npz, rr (CASP's): chosen pairs; zarr: the whole map.")  # fmt: skip
@click.option("--threshold", type=float, default=None, help="Keep pairs of at least this probability. [default: 0.3]")
@click.option("--top", type=int, default=None, help="Keep each residue's K strongest partners.")
@click.option("--band", type=int, default=None, help="Keep pairs at most W positions apart.")
@min_separation_option
@click.option("--array-dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True,
              help="Of whole maps.")  # fmt: skip
@click.option("--head", type=click.Path(path_type=Path), default=None, help="A contact head made by `contacts fit`.")
@click.option("--figure", is_flag=True, help="Also draw each map.")
@max_memory_option
@on_error_option
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
    threads: int | None,
) -> int:
    """Contact probabilities of the proteins of FASTA files ("-" is standard input), by ESM-2's contact head.

    A map whose L x L numbers fit in memory is computed whole, a larger one some rows at a time in memory linear in L;
    the table says which. An interrupted run continues when the same command is given again. Exit status: 0 done, 2
    wrong input, 3 done except for skipped records, 130 interrupted.
    """
    from longlens.jobs.contacts import contacts as run_contacts
    from longlens.jobs.runner import SKIPPED

    warn_of_default_model()
    with shown_progress() as progress:
        maps = run_contacts(
            as_paths(fasta), model=model, output=output, format=format_, threshold=threshold, top=top, band=band,
            min_separation=min_separation, array_dtype=array_dtype, head=head, figure=figure, max_memory=max_memory,
            on_error=on_error, dtype=dtype, device=device, threads=choose_threads(threads), progress=progress,
        )  # fmt: skip
    _summary(maps)
    return SKIPPED if maps.skipped else 0


@contacts.command("fit")
@click.argument("structures", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File for the head, .safetensors.")
@click.option("--fasta", type=click.Path(path_type=Path), default=None,
              help="The proteins of contact lists; structures contain theirs.")  # fmt: skip
@click.option(
    "--strength",
    type=float,
    default=0.15,
    show_default=True,
    help="Inverse strength C of the L1 penalty; a smaller C gives a sparser head.",
)
@min_separation_option
@click.option("--negatives", type=int, default=20_000, show_default=True, help="Pairs without contact taken from each "
              "protein at most.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@max_memory_option
@model_options
def fit(
    structures: tuple[str, ...],
    output: Path,
    fasta: Path | None,
    strength: float,
    min_separation: int,
    negatives: int,
    seed: int,
    max_memory: str | None,
    model: str,
    dtype: str,
    device: str,
    threads: int | None,
) -> None:
    """Fit a contact head: logistic regression with an L1 penalty on a model's attention (Rao et al. 2020).

    STRUCTURES are .pdb or .cif files (contact: C-beta atoms less than 8 Angstrom apart), or tables (.csv, .tsv) of the
    columns id, i, j (residues from 1), whose proteins --fasta gives. Twenty proteins are enough to start
    with. Needs the extra `fit`.
    """
    from longlens.jobs.fit_contacts import FitOptions
    from longlens.jobs.fit_job import fit_contacts

    warn_of_default_model()
    with shown_progress() as progress:
        job = fit_contacts(
            structures, output=output, fasta=fasta, model=model,
            options=FitOptions(strength=strength, separation=min_separation, negatives=negatives, seed=seed),
            max_memory=max_memory, dtype=dtype, device=device, threads=choose_threads(threads), progress=progress,
        )  # fmt: skip
    click.echo(f"model       {job.model.name}")
    click.echo(f"proteins    {len(job.examples):,}")
    if job.fitted is not None:
        _print_fit(job.fitted)
    click.echo(f"head        {output}")


@contacts.command("evaluate")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--fasta", type=click.Path(path_type=Path), default=None,
              help="The proteins, to align them with chains of another sequence.")  # fmt: skip
@click.option("--length", type=click.Choice(["full", "resolved"]), default="full", show_default=True,
              help="What L is: the residues of the chain's sequence, or those with atoms.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), default=None, help="CSV file for all proteins.")
def evaluate(files: tuple[Path, ...], fasta: Path | None, length: str, output: Path | None) -> None:
    """Precision of predicted contacts at L, L/2 and L/5, for pairs 6 to 11, 12 to 23, and 24 or more residues apart.

    FILES are predictions (folders of `longlens contacts`, or CASP's .rr files) and structures (.pdb, .ent, .cif,
    .mmcif), in any order. Contact: C-beta atoms less than 8 Angstrom apart. Residues without atoms are left out of both
    sides.
    """
    from longlens.jobs.evaluate_contacts import evaluate_contacts

    structures = [path for path in files if path.suffix.lower() in (".pdb", ".ent", ".cif", ".mmcif")]
    found = evaluate_contacts(
        [path for path in files if path not in structures], structures, fasta=fasta, length=length
    )
    click.echo(f"L           the residues {'of the whole sequence' if length == 'full' else 'with atoms'}")
    for row in found.summary:
        proteins = counted(row["proteins"], "protein")
        click.echo(f"{row['range']:<8}{row['cut']:<4}{row['precision']:.3f}, by chance {row['chance']:.3f}, {proteins}")
    short = sorted({row["id"] for row in found.rows if row["held"] < row["count"]})
    if short:
        click.echo(
            f"longlens: warning: {len(short):,} predictions, such as {short[0]}, have fewer pairs than asked for; the "
            "missing ones count as no contacts: predict with a lower --threshold",
            err=True,
        )
    if found.unmatched:
        click.echo(
            f"longlens: warning: {len(found.unmatched):,} predictions have no structure, such as {found.unmatched[0]}",
            err=True,
        )
    if found.without_contacts:
        click.echo(
            f"longlens: warning: {len(found.without_contacts):,} proteins, such as {found.without_contacts[0]}, have "
            "no contacts in their structure and are left out",
            err=True,
        )
    if output is not None:
        click.echo(f"results     {found.save(output)}")


def _print_fit(fitted: FittedHead) -> None:
    click.echo(f"pairs       {fitted.contacts:,} contacts, {fitted.others:,} others")
    click.echo(f"heads used  {int((fitted.regression.weight != 0).sum())} of {fitted.regression.weight.numel()}")
    for number, part in enumerate(fitted.precision):
        several = part.proteins > 1
        spread = f" ({part.lowest:.2f} to {part.highest:.2f} over {part.proteins} proteins)" if several else ""
        click.echo(
            f"{'' if number else 'precision':<11} {part.mean:.2f}{spread} of the L strongest pairs at least "
            f"{part.separation} apart; by chance {part.chance:.2f}"
        )
    if fitted.held_out:
        click.echo("            of proteins held out: each is predicted by a head fitted to others")
    else:
        click.echo("            of the proteins fitted to, which flatters the head: fit to several different proteins")


def _summary(maps: ContactMaps) -> None:
    """Print a summary on standard output."""
    from longlens.jobs.plan import peak_memory
    from longlens.ops.explain import format_bytes

    rows = [row for row in maps.table if row["problem"] is None]
    linear = sum(row["form"] == "kept" for row in rows)
    click.echo(f"model       {maps.model}")
    click.echo(f"proteins    {len(rows):,} (longest {max(row['length'] for row in rows):,} residues)")
    click.echo(f"pairs       {sum(row['pairs'] for row in rows):,}")
    click.echo(f"form        {len(rows) - linear:,} maps computed whole, {linear:,} in linear memory")
    if maps.skipped:
        click.echo(f"skipped     {len(maps.skipped):,} records: see `problem` in the table")
    click.echo(f"peak memory {format_bytes(peak_memory())} for the whole process, including PyTorch")
    click.echo(f"results     {maps.folder / 'index.parquet'}")
