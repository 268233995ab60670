"""How the attention of PyTorch and of other packages is called on prepared queries, keys and values.

What a peer's layer does around its core (projections of the hidden states, residual convolutions) is replaced by
handing it the prepared tensors, so that the time is the core's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks import BLOCK, FEATURES, LANDMARKS, RANK, WINDOW, Call, Task, keep, leaves, projections

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
    # `fullgraph`: past the limit of recompilations it raises instead of running dense with a warning
    compiled = torch.compile(flex_attention, fullgraph=True)
    return Call(lambda: compiled(q, k, v, block_mask=block_mask), (q, k, v))


# ---- other packages


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
