"""`longlens paint`: numbers of residues onto a structure."""

from __future__ import annotations

from pathlib import Path

import click

# mismatches of a chain that are listed
LISTED = 20


@click.command()
@click.argument("structure", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--values", required=True, type=click.Path(path_type=Path, exists=True),
              help="A folder of embed, look or context, or a table with a column of residues.")  # fmt: skip
@click.option("--column", default="surprise", show_default=True, help="Array or column to show; mean: of the 19 "
              "substitutions in a table of score --all.")  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path),
              help=".cif: in the B-factor column; .defattr: an attribute for ChimeraX.")  # fmt: skip
@click.option("--protein", default=None, help="The protein's id, if the results have several.")
@click.option("--chain", multiple=True, help="Chains to paint. [default: all of the protein]")
@click.option("--fasta", type=click.Path(path_type=Path), default=None,
              help="The proteins, if no chain is identical to one that was embedded.")  # fmt: skip
@click.option("--attribute", default=None, help="Name of ChimeraX's attribute. [default: the column]")
@click.option("--missing", type=float, default=None, help="Number of atoms that have none. [default: 0]")
def paint(
    structure: Path,
    values: Path,
    column: str,
    output: Path,
    protein: str | None,
    chain: tuple[str, ...],
    fasta: Path | None,
    attribute: str | None,
    missing: float | None,
) -> None:
    """Write a number for each residue, such as its surprise, onto a STRUCTURE (PDB or mmCIF), as a new file.

    The protein is aligned with the whole sequence of each chain, so that residues without atoms shift nothing;
    mismatches are listed. In ChimeraX open the structure and then the .defattr file, and colour by the attribute;
    colour a .cif file by B-factor in any viewer.
    """
    from longlens.jobs.paint import paint as run_paint

    painting = run_paint(
        structure, values, output, column=column, protein=protein, chain=chain or None, fasta=fasta,
        attribute=attribute, missing=missing,
    )  # fmt: skip
    for part in painting.chains:
        click.echo(
            f"chain {part.id:<5} {part.painted:,} residues painted, {part.bare:,} without a number, "
            f"{part.unresolved:,} without atoms, {len(part.mismatches):,} mismatches"
        )
        for mismatch in part.mismatches[:LISTED]:
            click.echo(f"longlens: warning: chain {part.id}: {mismatch}", err=True)
        if len(part.mismatches) > LISTED:
            click.echo(f"longlens: warning: chain {part.id}: and {len(part.mismatches) - LISTED:,} more", err=True)
    click.echo(f"results     {painting.path}")
