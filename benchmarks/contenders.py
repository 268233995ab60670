"""Who takes part: every method of longlens and the peers, each as one line that builds a call.

A contender is built for a `Task` and gives a `Call`: a function of no arguments that runs the attention core on
queries, keys and values prepared beforehand in the contender's own layout. What a peer's layer does around its core
(projections of the hidden states, residual convolutions) is replaced by handing it the prepared tensors, so that the
time is the core's.

Adding a method of longlens is one line in `CONTENDERS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALL = (512, 2048, 8192, 16384, 32768, 65536, 131072)
SHORT = 16384
FEATURES, LANDMARKS, RANK, WINDOW, BLOCK = 256, 64, 256, 256, 64


@dataclass(frozen=True)
class Task:
    """One attention problem: batch 1, `heads` heads, `length` queries and keys of `width`, standard normal."""

    length: int
    heads: int = 8
    width: int = 64
    dtype: str = "float32"
    backward: bool = False
    device: str = "cpu"

    def draw(self, value_width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (1, heads, length, width), the same for every contender."""
        generator = torch.Generator().manual_seed(0)

        def normal(width: int) -> Tensor:
            shape = (1, self.heads, self.length, width)
            return torch.randn(shape, generator=generator).to(self.device, getattr(torch, self.dtype))

        return normal(self.width), normal(self.width), normal(value_width or self.width)


@dataclass(frozen=True)
class Call:
    """A call ready to be timed: `run()` gives the output, whose gradient goes to `leaves`.

    `output` turns what `run` returns into (1, H, N, Dv) and `query_grad` the gradients of `leaves` into that of the
    query.
    """

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    output: Callable[[Tensor], Tensor] = lambda out: out
    query_grad: Callable[[tuple[Tensor, ...]], Tensor] = lambda grads: grads[0]


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


def keep(task: Task) -> Tensor:
    """(1, N) bool: the last eighth of the keys is padding."""
    return (torch.arange(task.length, device=task.device) < task.length - task.length // 8).unsqueeze(0)


# ---- longlens


def pattern(method: str, length: int) -> Any:
    """The method of a string form. "blocksparse" is a layout for the length: own block, the two beside, block 0."""
    if method != "blocksparse":
        from longlens.ops.registry import parse_method

        return parse_method(method)
    from longlens.ops.sparse.block_sparse import BlockSparse

    blocks = -(-length // BLOCK)
    return BlockSparse(
        tuple(tuple(sorted({0, *range(max(0, b - 1), min(blocks, b + 2))})) for b in range(blocks)), BLOCK
    )


def attend(method: str, task: Task, *, value_width: int | None = None, padded: bool = False, **options: Any) -> Call:
    """`longlens.attention` with a method's string form."""
    from longlens.ops.attention import attention

    q, k, v = leaves(task, *task.draw(value_width))
    chosen = pattern(method, task.length)
    if padded:
        options["key_mask"] = keep(task)

    def run() -> Tensor:
        out = attention(q, k, v, method=chosen, **options)
        return out[0] if isinstance(out, tuple) else out

    return Call(run, (q, k, v))


def ours(method: str, theme: str, label: str = "", pairs: str = "all", exact: bool = True, **more: Any) -> Contender:
    options = {name: more.pop(name) for name in list(more) if name not in Contender.__dataclass_fields__}
    width = more.get("value_width")
    build = partial(attend, method, value_width=width, **options)
    name = f"longlens {method}" + (f", {label}" if label else "")
    return Contender(name, theme, build, pairs, exact, **more)


def projections(task: Task) -> tuple[Tensor, Tensor]:
    """Linformer's projections of keys and values over the length, (RANK, N) each, as random as before training."""
    generator = torch.Generator().manual_seed(3)
    drawn = (torch.rand(2, RANK, task.length, generator=generator) * 2 - 1) * RANK**-0.5
    return drawn.to(task.device, getattr(torch, task.dtype)).unbind(0)


def projected(task: Task) -> Call:
    """Linformer with learned projections, as the paper and the `linformer` package have it; they get no gradient."""
    from longlens.ops.approximate.linformer import Linformer
    from longlens.ops.attention import attention

    q, k, v = leaves(task, *task.draw())
    method = Linformer(RANK, *projections(task))
    return Call(lambda: attention(q, k, v, method=method), (q, k, v))


# ---- PyTorch


def sdpa(task: Task, *, value_width: int | None = None, mask: str = "", backend: str = "", **options: Any) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = leaves(task, *task.draw(value_width))
    given = None
    if mask in ("row", "expanded"):
        given = keep(task)[:, None, None, :]
        given = given.expand(1, 1, task.length, task.length) if mask == "expanded" else given
    elif mask == "window":
        place = torch.arange(task.length, device=task.device)
        given = ((place[:, None] - place[None]).abs() <= WINDOW)[None, None]

    def run() -> Tensor:
        if backend:
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(q, k, v, given, **options)
        return F.scaled_dot_product_attention(q, k, v, given, **options)

    return Call(run, (q, k, v))


def flex(task: Task, *, window: bool = False) -> Call:
    """Compiled FlexAttention; the block mask is made beforehand, by the compiler, and is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = leaves(task, *task.draw())
    block_mask = None

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= WINDOW if window else j >= 0

    # also without a window: without a block mask its CPU kernel needs N x N memory
    block_mask = torch.compile(create_block_mask)(rule, None, None, task.length, task.length, device=task.device)
    compiled = torch.compile(flex_attention)
    return Call(lambda: compiled(q, k, v, block_mask=block_mask), (q, k, v))


# ---- peers


def leaves(task: Task, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.requires_grad_(task.backward) for tensor in tensors)


def flat(tensor: Tensor) -> Tensor:
    """(1, H, N, D) as the (1, N, H D) that a layer's projection gives."""
    return tensor.transpose(1, 2).flatten(2).contiguous()


def unflat(heads: int, out: Tensor) -> Tensor:
    return out.unflatten(-1, (heads, -1)).transpose(1, 2)


class Given(nn.Module):
    """Stands where a layer has a projection: gives the prepared tensor, whatever the hidden states are."""

    def __init__(self, tensor: Tensor, *, copied: bool = False, turned: bool = False) -> None:
        super().__init__()
        self.tensor = [tensor]
        self.copied = copied
        self.turned = turned

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.tensor[0]
        if self.turned:
            out = out.transpose(0, 1)[: hidden.shape[0]]
        # the layer scales this one in place
        return out.clone() if self.copied else out


def performer_pytorch(task: Task, *, kernel: str = "softmax") -> Call:
    from performer_pytorch import FastAttention

    q, k, v = leaves(task, *task.draw())
    torch.manual_seed(0)
    module = FastAttention(task.width, FEATURES, generalized_attention=kernel == "relu").to(q.device)
    return Call(lambda: module(q, k, v), (q, k, v))


def performer_pytorch_linear(task: Task) -> Call:
    """Its `linear_attention` on elu + 1 features: the formula of `longlens linear`."""
    from performer_pytorch.performer_pytorch import linear_attention

    q, k, v = leaves(task, *task.draw())
    return Call(lambda: linear_attention(F.elu(q) + 1, F.elu(k) + 1, v), (q, k, v))


def nystrom_attention(task: Task) -> Call:
    from nystrom_attention import NystromAttention

    q, k, v = task.draw()
    (qkv,) = leaves(task, torch.cat([flat(q), flat(k), flat(v)], -1))
    module = NystromAttention(
        1, dim_head=task.width, heads=task.heads, num_landmarks=LANDMARKS, residual=False
    ).to(q.device, q.dtype)  # fmt: skip
    module.to_qkv, module.to_out = Given(qkv), nn.Identity()
    hidden = q.new_zeros(1, task.length, 1)
    inner = task.heads * task.width
    return Call(
        lambda: module(hidden), (qkv,), partial(unflat, task.heads), lambda g: unflat(task.heads, g[0][..., :inner])
    )


def linformer(task: Task) -> Call:
    from linformer import LinformerSelfAttention

    q, k, v = leaves(task, *(flat(tensor) for tensor in task.draw()))
    module = LinformerSelfAttention(task.heads, task.length, k=RANK, heads=task.heads, dim_head=task.width)
    module = module.to(q.device, q.dtype)
    module.requires_grad_(requires_grad=False)
    for parameter, given in zip((module.proj_k, module.proj_v), projections(task), strict=True):
        parameter.copy_(given.T)
    module.to_q, module.to_k, module.to_v, module.to_out = Given(q), Given(k), Given(v), nn.Identity()
    hidden = q.detach().new_zeros(1, task.length, task.heads)
    return Call(lambda: module(hidden), (q, k, v), partial(unflat, task.heads), lambda g: unflat(task.heads, g[0]))


def local_attention(task: Task) -> Call:
    from local_attention import LocalAttention

    q, k, v = leaves(task, *task.draw())
    module = LocalAttention(WINDOW, look_backward=1, look_forward=1, exact_windowsize=True, use_rotary_pos_emb=False)
    return Call(lambda: module(q, k, v), (q, k, v))


def hf_nystromformer(task: Task) -> Call:
    from transformers.models.nystromformer import modeling_nystromformer as home

    config = home.NystromformerConfig(
        hidden_size=task.heads * task.width, num_attention_heads=task.heads, num_landmarks=LANDMARKS,
        segment_means_seq_len=task.length, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = home.NystromformerSelfAttention(config)
    layer.conv_kernel_size = None  # the layer's own switch for no residual convolution, which the configuration refuses
    return _hf(task, layer, lambda module, hidden: module(hidden)[0])


def hf_longformer(task: Task, *, tokens: int = 0) -> Call:
    from transformers.models.longformer import modeling_longformer as home

    config = home.LongformerConfig(
        hidden_size=task.heads * task.width, num_attention_heads=task.heads, attention_window=[2 * WINDOW],
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    mask = torch.zeros(1, task.length, device=task.device)
    mask[:, :tokens] = 10000.0
    index = {"is_index_masked": mask < 0, "is_index_global_attn": mask > 0, "is_global_attn": tokens > 0}

    def run(module: nn.Module, hidden: Tensor) -> Tensor:
        return module(hidden, attention_mask=mask, **index)[0]

    return _hf(task, home.LongformerSelfAttention(config, 0), run, turned=True, copied=True)


def hf_bigbird(task: Task) -> Call:
    from transformers.models.big_bird import modeling_big_bird as home

    config = home.BigBirdConfig(
        hidden_size=task.heads * task.width, num_attention_heads=task.heads, block_size=BLOCK, num_random_blocks=3,
        max_position_embeddings=task.length, attention_type="block_sparse",
    )  # fmt: skip
    ones = torch.ones(1, task.length, device=task.device, dtype=getattr(torch, task.dtype))
    blocked, band, rows, columns = home.BigBirdModel.create_masks_for_block_sparse_attn(ones, BLOCK)

    def run(module: nn.Module, hidden: Tensor) -> Tensor:
        return module(hidden, band, rows, columns, blocked, blocked)[0]

    return _hf(task, home.BigBirdBlockSparseAttention(config, seed=0), run)


def _hf(
    task: Task, module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], *, turned: bool = False,
    copied: bool = False,
) -> Call:  # fmt: skip
    """A self-attention layer of transformers without its projections."""
    q, k, v = leaves(task, *(flat(tensor) for tensor in task.draw()))
    module = module.to(q.device, q.dtype).eval()
    for name, tensor in {"query": q, "key": k, "value": v}.items():
        setattr(module, name, Given(tensor, copied=copied and name == "query", turned=turned))
        if hasattr(module, f"{name}_global"):
            setattr(module, f"{name}_global", Given(tensor, copied=copied and name == "query", turned=turned))
    hidden = q.detach()
    return Call(lambda: run(module, hidden), (q, k, v), partial(unflat, task.heads), lambda g: unflat(task.heads, g[0]))


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
