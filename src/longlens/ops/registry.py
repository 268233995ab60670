"""Every method by name: where its class lives and what it can do. Nothing is imported until it is used.

This table is the one place that capabilities are declared; `attention` refuses by it, `longlens methods` prints it and
the tests run over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from longlens.errors import MethodError

if TYPE_CHECKING:
    from longlens.ops.method import Method


@dataclass(frozen=True)
class MethodInfo:
    """One method: its class, and what it can do.

    `exact`: softmax attention over all pairs ("all"), over the pairs of its pattern ("pairs"), or an approximation
    ("no"). `masks`: mask rules and bool tensors as `attn_mask`. `bias`: additive bias.
    `softcap`, `sinks`: capped scores, and logits that take part of each row's mass. All take key masks, packing,
    grouped heads, any value width and `scale`. `memory` and `time` are orders in the length N.
    """

    name: str
    path: str
    family: str
    exact: str
    memory: str
    time: str
    paper: str
    causal: bool = True
    masks: bool = True
    bias: bool = True
    dropout: bool = True
    lse: bool = True
    softcap: bool = True
    sinks: bool = True
    second_derivatives: bool = False

    def load(self) -> type[Method]:
        """Import the method's module and return its class."""
        module, _, name = self.path.partition(":")
        return getattr(import_module(module), name)


def _sparse(name: str, path: str, time: str, paper: str, *, masks: bool = True, bias: bool = True) -> MethodInfo:
    return MethodInfo(name, f"longlens.ops.sparse.{path}", "sparse", "pairs", "N", time, paper, masks=masks, bias=bias)


def _approximate(name: str, path: str, paper: str, *, causal: bool = True, time: str = "N") -> MethodInfo:
    return MethodInfo(name, f"longlens.ops.approximate.{path}", "approximate", "no", "N", time, paper,
                 causal=causal, masks=False, bias=False, dropout=False, lse=False, softcap=False, sinks=False,
                 second_derivatives=True)  # fmt: skip


METHOD_INFOS: tuple[MethodInfo, ...] = (
    MethodInfo("exact", "longlens.ops.exact.exact:Exact", "exact", "all", "N", "N^2",
          "Rabe & Staats 2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135"),
    _sparse("window", "window:Window", "N w", "Beltagy et al. 2020, arXiv:2004.05150"),
    _sparse("dilated", "dilated:Dilated", "N w", "Beltagy et al. 2020, arXiv:2004.05150"),
    _sparse("global", "global_tokens:Global", "N g", "Beltagy et al. 2020, arXiv:2004.05150"),
    _sparse("random", "random_blocks:Random", "N r b", "Zaheer et al. 2020, arXiv:2007.14062"),
    _sparse("strided", "strided:Strided", "N (s + N/s)", "Child et al. 2019, arXiv:1904.10509"),
    _sparse("fixed", "fixed:Fixed", "N (s + N c/s)", "Child et al. 2019, arXiv:1904.10509"),
    _sparse("blocksparse", "block_sparse:BlockSparse", "layout", "Gray et al. 2017, Block-Sparse Weights"),
    _sparse("lsh", "lsh:LSH", "N r b", "Kitaev et al. 2020, arXiv:2001.04451", masks=False, bias=False),
    _sparse("longformer", "longformer:Longformer", "N (w + g)", "Beltagy et al. 2020, arXiv:2004.05150"),
    _sparse("bigbird", "bigbird:BigBird", "N b (3 + r + g)", "Zaheer et al. 2020, arXiv:2007.14062"),
    _approximate("linear", "linear:Linear", "Katharopoulos et al. 2020, arXiv:2006.16236"),
    _approximate("performer", "performer:Performer", "Choromanski et al. 2021, arXiv:2009.14794"),
    _approximate("cosformer", "cosformer:CosFormer", "Qin et al. 2022, arXiv:2202.08791"),
    _approximate("taylor", "taylor:Taylor", "Keles et al. 2023, arXiv:2209.04881"),
    _approximate("nystrom", "nystrom:Nystrom", "Xiong et al. 2021, arXiv:2102.03902", causal=False),
    _approximate("linformer", "linformer:Linformer", "Wang et al. 2020, arXiv:2006.04768", causal=False),
    _approximate("scatterbrain", "scatterbrain:Scatterbrain", "Chen et al. 2021, arXiv:2110.15343"),
)  # fmt: skip

BY_NAME: dict[str, MethodInfo] = {entry.name: entry for entry in METHOD_INFOS}


def method_info(name: str) -> MethodInfo:
    """The method called `name`; `MethodError` with the nearest names where there is none."""
    if name in BY_NAME:
        return BY_NAME[name]
    from difflib import get_close_matches

    name = name if len(name) <= 40 else f"{name[:37]}..."
    near = get_close_matches(name, BY_NAME, n=3)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else "`longlens methods` lists them"
    raise MethodError(f"unknown method '{name}': expected one of {', '.join(BY_NAME)}; {hint}")


def parse_method(text: str) -> Method:
    """The method that a string form names: `"exact"`, `"window:256"`, `"window:64|global:(0,)"`.

    Raises `MethodError` for an unknown name or parameter, and for a text of more than 100,000 characters.
    """
    from longlens.ops.method import LONGEST, build_method

    if len(text) > LONGEST:
        raise MethodError(
            f"expected the string form of a method to have at most {LONGEST:,} characters, got {len(text):,}; build "
            "the method from its class instead"
        )
    parts = [part.strip() for part in text.split("|")]
    built = []
    for part in parts:
        name, _, arguments = part.partition(":")
        built.append(build_method(method_info(name.strip()).load(), arguments))
    if len(built) == 1:
        return built[0]
    from longlens.ops.sparse.pattern import unite

    return unite(built)


def resolve_method(method: Method | str) -> Method:
    """`method` itself, or what its string form names."""
    from longlens.ops.method import Method

    if isinstance(method, str):
        return parse_method(method)
    if not isinstance(method, Method):
        raise MethodError(f"expected a method such as longlens.Window(256) or 'window:256', got {method!r}")
    return method
