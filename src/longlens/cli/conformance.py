"""`longlens conformance`: run an attention function through the conformance suite."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from longlens.testing import Claims, ConformanceReport


@click.command()
@click.argument("function", metavar="[MODULE:FUNCTION]", required=False)
@click.option("--method", help="Test one of longlens' own methods, such as window:256.")
@click.option("--claims", metavar="MODULE:NAME", help="A longlens.testing.Claims object that says what FUNCTION does.")
@click.option(
    "--claim", "single", metavar="NAME=VALUE", multiple=True, help="One claim, such as key_mask=mask; may be repeated."
)
@click.option("--check", "checks", metavar="NAME", multiple=True, help="Run only this check; may be repeated.")
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Also write the report to this file."
)
def conformance(
    function: str | None,
    method: str | None,
    claims: str | None,
    single: tuple[str, ...],
    checks: tuple[str, ...],
    target: Path | None,
) -> None:
    """Run an attention function through the conformance suite.

    MODULE:FUNCTION takes (query, key, value) of shape (B, H, N, D) and the keywords of
    torch.nn.functional.scaled_dot_product_attention that it claims. The current folder is searched for the module.

    Prints a table. Exit status: 0 if all claims hold, 1 if one fails, 2 if the suite cannot be run.

    \b
    longlens conformance torch.nn.functional:scaled_dot_product_attention --claim causal=top-left
    longlens conformance --method window:256
    """
    if (function is None) == (method is None):
        raise click.UsageError("expected either MODULE:FUNCTION or --method METHOD")
    if method is not None and (claims or single):
        raise click.UsageError("--claims and --claim go with MODULE:FUNCTION; a method's claims are in the registry")
    # the user's module may be in the current folder; for --method no file of that folder must be imported
    if function is not None and "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    report = _run(function, method, claims, single, checks)
    click.echo(report.table())
    if target is not None:
        target.write_text(report.to_json() + "\n")
    if not report.ok:
        sys.exit(1)


def _run(
    function: str | None, method: str | None, claims: str | None, single: tuple[str, ...], checks: tuple[str, ...]
) -> ConformanceReport:
    from longlens.errors import InputError
    from longlens.testing import run_conformance, run_method
    from longlens.testing.memory import import_function

    try:
        if method is not None:
            return run_method(method, checks=checks or None)
        assert function is not None
        return run_conformance(
            import_function(function),
            claims=_claims(claims, single),
            target=function,
            checks=checks or None,
            name=function,
        )
    except InputError as error:
        raise click.UsageError(str(error)) from None


def _claims(path: str | None, single: tuple[str, ...]) -> Claims:
    from dataclasses import replace

    from longlens.errors import InputError
    from longlens.testing import Claims
    from longlens.testing.memory import import_object

    base = Claims() if path is None else import_object(path)
    if not isinstance(base, Claims):
        raise InputError(f"expected --claims {path} to name a longlens.testing.Claims, got a {type(base).__name__}")
    values: dict[str, Any] = {}
    for item in single:
        name, equals, raw = item.partition("=")
        if not equals or name not in Claims.names():
            raise InputError(f"expected --claim NAME=VALUE with a name among {', '.join(Claims.names())}, got '{item}'")
        try:
            values[name] = ast.literal_eval(raw)
        except (ValueError, SyntaxError):
            values[name] = raw
    return replace(base, **values)
