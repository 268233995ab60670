"""`longlens explain`: the path that a call of `attention` would take, from shapes alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from longlens.cli.wrapping import wrap_lines
from longlens.errors import MaskError

if TYPE_CHECKING:
    from torch import Tensor

    from longlens.ops.biases import Bias
    from longlens.ops.masks import Rule

Shape = tuple[int, ...]


class ShapeType(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """Four numbers with commas between them."""

    name = "B,H,N,D"

    def convert(self, value: str | Shape, param: click.Parameter | None, ctx: click.Context | None) -> Shape:
        """`"1,8,16384,64"` -> `(1, 8, 16384, 64)`."""
        if isinstance(value, tuple):
            return value
        try:
            shape = tuple(int(part.replace("_", "")) for part in value.split(","))
        except ValueError:
            shape = ()
        if len(shape) != 4 or min(shape) < 0:
            self.fail(f"expected batch, heads, length and width, such as 1,8,16384,64; got {value!r}", param, ctx)
        return shape


@click.command()
@click.option("--shape", type=ShapeType(), required=True, help="Shape of the query: batch, heads, length, width.")
@click.option("--key-shape", type=ShapeType(), help="Shape of the key. [default: that of the query]")
@click.option(
    "--value-width", type=click.IntRange(0), metavar="WIDTH", help="Shape of the value. [default: that of the key]"
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16", "float64"]), default="float32", show_default=True
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="The device need not be present.",
)
@click.option("--method", default="exact", show_default=True, metavar="METHOD",
              help="Such as window:256, performer:features=512, 'window:64|global'; see longlens methods.")  # fmt: skip
@click.option("--causal", is_flag=True, help="is_causal=True.")
@click.option("--padded", is_flag=True, help="With a key mask.")
@click.option(
    "--packed", type=click.IntRange(1), metavar="SEQUENCES", help="Number of packed sequences, all of one length."
)
@click.option("--dropout", type=float, default=0.0, metavar="P", help="dropout_p.")
@click.option("--bias", type=click.Choice(["alibi", "tensor"]), help="An additive bias: a rule, or a quadratic tensor.")
@click.option("--mask", metavar="RULE",
              help="attn_mask: sparse methods, prefix:LENGTH, joined by &; or tensor (quadratic).")  # fmt: skip
@click.option("--softcap", type=float, metavar="CAP", help="softcap.")
@click.option("--sinks", is_flag=True, help="With a sink of each head.")
@click.option("--lse", is_flag=True, help="With the log-sum-exp.")
@click.option("--grad", is_flag=True, help="Forward and backward.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(
    shape: Shape,
    key_shape: Shape | None,
    value_width: int | None,
    dtype: str,
    device: str,
    method: str,
    causal: bool,
    padded: bool,
    packed: int | None,
    dropout: float,
    bias: str | None,
    mask: str | None,
    softcap: float | None,
    sinks: bool,
    lse: bool,
    grad: bool,
    as_json: bool,
) -> None:
    """Show the path that a call of attention would take, without running it.

    Prints the path that would run, the order of its memory, the bytes that it is predicted to take beyond the inputs,
    and for every other path and method either the reason why it cannot run or that it could.
    """
    import torch

    import longlens

    key = key_shape or shape
    explanation = longlens.explain(
        shape,
        key,
        (*key[:3], key[3] if value_width is None else value_width),
        attn_mask=None if mask is None else read_mask(mask, shape, key),
        dropout_p=dropout,
        is_causal=causal,
        method=method,
        key_mask=padded or None,
        cu_seqlens=None if packed is None else torch.linspace(0, shape[2], packed + 1).to(torch.int32),
        bias=None if bias is None else _bias(bias, shape, key),
        return_lse=lse,
        softcap=softcap,
        sinks=sinks or None,
        dtype=getattr(torch, dtype),
        device=device,
        requires_grad=grad,
    )
    click.echo(json.dumps(asdict(explanation), indent=2) if as_json else wrap_lines(str(explanation)))


def read_mask(text: str, query: Shape, key: Shape) -> Rule | Tensor:
    """The mask that `text` names: `"window:256 & prefix:10"`, or `"tensor"`. Raises `MaskError` if there is none."""
    import torch

    import longlens
    from longlens.ops.masks import AllOf, Rule

    if text == "tensor":
        return torch.empty(1, 1, query[2], key[2], dtype=torch.bool, device="meta")
    rules: list[Rule] = []
    for part in (part.strip() for part in text.split("&")):
        name, _, length = part.partition(":")
        if name == "prefix" and length.isdecimal():
            rules.append(longlens.Prefix(int(length)))
            continue
        rule = longlens.parse_method(part)
        if not isinstance(rule, Rule):
            raise MaskError(
                f"expected a mask rule (a sparse method other than lsh, prefix:LENGTH, tensor), got '{part}'"
            )
        rules.append(rule)
    return rules[0] if len(rules) == 1 else AllOf(tuple(rules))


def _bias(name: str, query: Shape, key: Shape) -> Bias | Tensor:
    import torch

    import longlens

    if name == "alibi":
        return longlens.Alibi(query[1])
    return torch.empty(1, query[1], query[2], key[2], device="meta")
