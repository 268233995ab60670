"""Who takes part: every method of longlens and the peers, each as one line that builds a call.

A contender is built for a `Task` and gives a `Call`: a function of no arguments that runs the attention core on
queries, keys and values prepared beforehand in the contender's own layout.

Adding a method of longlens is one line in `CONTENDERS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

import longlens
from peers import (
    flex,
    hf_bigbird,
    hf_longformer,
    hf_nystromformer,
    linformer,
    local_attention,
    nystrom_attention,
    performer_pytorch,
    performer_pytorch_linear,
    sdpa,
)
from tasks import BLOCK, RANK, Call, Task, keep, leaves, projections

ALL = (512, 2048, 8192, 16384, 32768, 65536, 131072)
SHORT = 16384


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    `pairs`: what the definition in float64 is taken over: "all", "causal", "padded" (the last eighth of the keys
    hidden), the string form of a sparse method of longlens, or "" where the output is random. `order`: of
    time, for predictions. `trains`: has a backward pass on a CPU.
    """

    name: str
    theme: str
    build: Callable[[Task], Call]
    pairs: str = "all"
    exact: bool = True
    order: int = 1
    trains: bool = True
    longest: int = ALL[-1]
    compiled: bool = False
    least: int = 1
    note: str = ""
    value_width: int | None = field(default=None)

    @property
    def ours(self) -> bool:
        return self.name.startswith("longlens")


# ---- longlens


def pattern(method: str, length: int) -> Any:
    """The method of a string form. "blocksparse" is a layout for the length: own block, the two beside, block 0."""
    if method != "blocksparse":
        return longlens.parse_method(method)
    blocks = -(-length // BLOCK)
    return longlens.BlockSparse(
        tuple(tuple(sorted({0, *range(max(0, b - 1), min(blocks, b + 2))})) for b in range(blocks)), BLOCK
    )


def attend(method: str, task: Task, *, value_width: int | None = None, padded: bool = False, **options: Any) -> Call:
    """`longlens.attention` with a method's string form."""
    q, k, v = leaves(task, *task.draw(value_width))
    chosen = pattern(method, task.length)
    if padded:
        options["key_mask"] = keep(task)

    def run() -> Tensor:
        out = longlens.attention(q, k, v, method=chosen, **options)
        return out[0] if isinstance(out, tuple) else out

    return Call(run, (q, k, v))


def ours(method: str, theme: str, label: str = "", pairs: str = "all", exact: bool = True, **more: Any) -> Contender:
    options = {name: more.pop(name) for name in list(more) if name not in Contender.__dataclass_fields__}
    width = more.get("value_width")
    build = partial(attend, method, value_width=width, **options)
    name = f"longlens {method}" + (f", {label}" if label else "")
    return Contender(name, theme, build, pairs, exact, **more)


def projected(task: Task) -> Call:
    """Linformer with learned projections, as the paper and the `linformer` package have it; they get no gradient."""
    q, k, v = leaves(task, *task.draw())
    method = longlens.Linformer(RANK, *projections(task))
    return Call(lambda: longlens.attention(q, k, v, method=method), (q, k, v))


# ---- the list


def _torch(label: str, theme: str, build: Callable[..., Call], pairs: str = "all", **more: Any) -> Contender:
    options = {name: more.pop(name) for name in list(more) if name not in Contender.__dataclass_fields__}
    if "value_width" in more:
        options["value_width"] = more["value_width"]
    return Contender(f"torch {label}", theme, partial(build, **options), pairs, order=more.pop("order", 2), **more)


def _peer(name: str, theme: str, build: Callable[..., Call], **more: Any) -> Contender:
    options = {name: more.pop(name) for name in list(more) if name not in Contender.__dataclass_fields__}
    return Contender(name, theme, partial(build, **options), **more)


NO_PROJECTION = "the layer's core: its projections are replaced by the prepared tensors"
CONTENDERS: tuple[Contender, ...] = (
    ours("exact", "exact", order=2),
    ours("exact", "variants", "causal", "causal", is_causal=True, order=2, longest=SHORT),
    ours("exact", "variants", "dropout 0.1", "", dropout_p=0.1, order=2, longest=SHORT),
    ours("exact", "variants", "value width 32", value_width=32, order=2, longest=SHORT),
    ours("exact", "variants", "padding", "padded", padded=True, order=2, longest=SHORT),
    ours("exact", "variants", "log-sum-exp", return_lse=True, order=2, longest=SHORT),
    _torch("SDPA", "exact", sdpa),
    _torch("SDPA math", "exact", sdpa, backend="math", longest=32768),
    _torch("flex", "exact", flex, compiled=True, trains=False, note="block mask made beforehand, not timed"),
    _torch("SDPA, causal", "variants", sdpa, "causal", is_causal=True, longest=SHORT),
    _torch("SDPA, dropout 0.1", "variants", sdpa, "", dropout_p=0.1, longest=SHORT),
    _torch("SDPA, value width 32", "variants", sdpa, value_width=32, longest=SHORT),
    _torch("SDPA, padding", "variants", sdpa, "padded", mask="expanded", longest=SHORT,
           note="mask expanded to (1, 1, N, N), as transformers hands it over"),
    _torch("SDPA, padding as a row", "variants", sdpa, "padded", mask="row", longest=SHORT,
           note="mask (1, 1, 1, N), which stays linear"),
    ours("window:256", "sparse", pairs="window:256"),
    ours("dilated:256,dilation=4", "sparse", pairs="dilated:256,dilation=4"),
    ours("global:(0,)", "sparse", pairs="global:(0,)"),
    ours("random:3,64", "sparse", pairs="random:3,64"),
    ours("blocksparse", "sparse", pairs="blocksparse"),
    ours("longformer:256,global_tokens=(0,)", "sparse", pairs="longformer:256,global_tokens=(0,)"),
    ours("bigbird:block=64,random=3", "sparse", pairs="bigbird:block=64,random=3"),
    ours("strided:128", "sparse", pairs="strided:128"),
    ours("fixed:128", "sparse", pairs="fixed:128"),
    ours("lsh", "sparse", exact=False),
    _torch("flex, window 256", "sparse", flex, "window:256", window=True, compiled=True, trains=False, order=1,
           note="block mask made beforehand, not timed"),
    _torch("SDPA, window mask", "sparse", sdpa, "window:256", mask="window", longest=SHORT, note="N x N bool mask"),
    _peer("local-attention", "sparse", local_attention, pairs="window:256", note="exact_windowsize=True"),
    _peer("HF Longformer", "sparse", hf_longformer, pairs="window:256", note=NO_PROJECTION),
    _peer("HF Longformer, 1 global", "sparse", hf_longformer, tokens=1, pairs="longformer:256,global_tokens=(0,)",
          note=NO_PROJECTION),
    _peer("HF BigBird", "sparse", hf_bigbird, exact=False, least=1024,
          note=f"{NO_PROJECTION}; in eval mode its random blocks are all block 0"),
    ours("linear", "approximate", exact=False),
    ours("performer:256", "approximate", exact=False),
    ours("performer:256,kernel=relu", "approximate", exact=False),
    ours("cosformer", "approximate", exact=False),
    ours("taylor", "approximate", exact=False),
    ours("nystrom:64", "approximate", exact=False),
    ours("linformer:256", "approximate", exact=False, note="mean pooling: it has nothing to learn"),
    Contender("longlens linformer:256, learned", "approximate", projected, exact=False,
              note="random projections, the same as those of the linformer package"),
    ours("scatterbrain", "approximate", exact=False),
    _peer("performer-pytorch", "approximate", performer_pytorch, exact=False, note="FastAttention, 256 features"),
    _peer("performer-pytorch, ReLU", "approximate", performer_pytorch, kernel="relu", exact=False,
          note="FastAttention, 256 features, generalized_attention"),
    _peer("performer-pytorch, elu + 1", "approximate", performer_pytorch_linear, exact=False,
          note="its linear_attention on elu + 1 features"),
    _peer("nystrom-attention", "approximate", nystrom_attention, exact=False,
          note=f"{NO_PROJECTION}; no residual convolution"),
    _peer("HF Nystromformer", "approximate", hf_nystromformer, exact=False,
          note=f"{NO_PROJECTION}; no residual convolution"),
    _peer("linformer", "approximate", linformer, exact=False, note=f"{NO_PROJECTION}; learned projections"),
)  # fmt: skip

BY_NAME = {contender.name: contender for contender in CONTENDERS}


def build(name: str, task: Task) -> Call:
    """The call of a contender; warnings that packages give when they are loaded are not of interest here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BY_NAME[name].build(task)
