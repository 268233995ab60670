"""Speed of attention beside PyTorch's kernels, compiled FlexAttention and flash-attention; packed; every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import longlens
from gpu_steps.memory import METHODS, attention_call
from gpu_steps.setup import Setup, gradients

Build = Callable[[], Callable[[], object]]
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
# what a machine or a shape may not have
OPTIONAL = (*BACKENDS, "flash-attn", "flex", "flex, causal", "flex, window", "varlen_attn", "flash-attn, packed")


def run(setup: Setup) -> None:
    """The step: exact attention."""
    tokens, heads = setup.pick((65536, 16), (64, 2))
    for dtype, widths in (("bfloat16", (64, 32, 16, 24, 128)), ("float32", (64, 32))):
        for length in setup.pick((8192, 1024, 32768), (64,)):
            for width in setup.pick(widths, (16,)):
                shape = (max(1, tokens // length), heads, length, width)
                setup.compare(
                    f"exact {dtype} N={length} D={width}", builds(setup, shape, dtype), base="SDPA",
                    optional=OPTIONAL, flop=4 * shape[0] * heads * length**2 * width,
                )  # fmt: skip
    length = setup.pick(8192, 64)
    for dtype in ("bfloat16", "float32"):
        shape = (max(1, setup.pick(32768, 64) // length), heads, length, setup.pick(64, 16))
        for causal in (False, True):
            setup.compare(
                f"exact {dtype} N={length}, {'causal, ' if causal else ''}forward and backward",
                builds(setup, shape, dtype, causal=causal, backward=True), base="SDPA", optional=OPTIONAL,
            )  # fmt: skip
        setup.compare(
            f"exact {dtype} N={length}, causal", builds(setup, shape, dtype, causal=True), base="SDPA",
            optional=OPTIONAL,
        )  # fmt: skip


def builds(
    setup: Setup, shape: tuple[int, ...], dtype: str, *, causal: bool = False, backward: bool = False
) -> dict[str, Build]:
    """The contenders of one shape: all get the same tensors."""
    tensors = [setup.draw(*shape, dtype=dtype, seed=seed, grad=backward) for seed in (0, 1, 2)]
    query, key, value = tensors

    def whole(call: Callable[[], Tensor]) -> Build:
        return lambda: gradients(call, (query, key, value)) if backward else call

    def backend(which: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

        return call

    contenders = {
        "SDPA": whole(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal)),
        "longlens": whole(lambda: longlens.attention(query, key, value, is_causal=causal)),
        **{name: whole(backend(which)) for name, which in BACKENDS.items()},
        "flash-attn": flash(query, key, value, causal, backward),
    }
    if not backward:
        contenders["longlens, log-sum-exp"] = whole(
            lambda: longlens.attention(query, key, value, is_causal=causal, return_lse=True)[0]
        )
    # compiling takes some twenty seconds for each shape
    common = shape[2:] == setup.pick((8192, 64), (64, 16))
    if common and not (backward and setup.device == "cpu"):
        contenders["flex"] = flex(setup, query, key, value, "causal" if causal else "", backward)
    return contenders


def flex(setup: Setup, query: Tensor, key: Tensor, value: Tensor, rule: str, backward: bool) -> Build:
    """Compiled FlexAttention (uncompiled in a dry run: compiling takes half a minute); the block mask is not timed."""

    def build() -> Callable[[], object]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if rule == "window":
                return (i - j).abs() <= 256
            return j <= i if rule == "causal" else j >= 0

        n = query.shape[2]
        # past the limit of recompilations `fullgraph` raises instead of running dense with a warning
        if not setup.dry:
            # the limit counts all shapes of a process together
            torch.compiler.reset()
        attend = flex_attention if setup.dry else torch.compile(flex_attention, dynamic=False, fullgraph=True)
        mask = create_block_mask(keep, None, None, n, n, device=setup.device) if rule else None
        call = lambda: attend(query, key, value, block_mask=mask)  # noqa: E731
        return gradients(call, (query, key, value)) if backward else call

    return build


def flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, backward: bool) -> Build:
    """The flash-attn package, which has tokens before heads."""

    def build() -> Callable[[], object]:
        from flash_attn import flash_attn_func

        turned = [
            tensor.detach().transpose(1, 2).contiguous().requires_grad_(backward) for tensor in (query, key, value)
        ]
        call = lambda: flash_attn_func(*turned, causal=causal)  # noqa: E731
        return gradients(call, tuple(turned)) if backward else call

    return build


# ---- packed sequences


def run_packed(setup: Setup) -> None:
    """The step: 200 sequences of mixed lengths, as a batch of proteins has them."""
    generator = torch.Generator().manual_seed(3)
    for label, low, high, count in setup.pick(
        (("40 to 600", 40, 600, 200), ("100 to 1,000", 100, 1000, 100)), (("5 to 20", 5, 20, 4),)
    ):
        lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
        for dtype in ("bfloat16", "float32"):
            for width in setup.pick((24, 32, 64), (16,)):
                setup.compare(
                    f"packed {dtype}, {count} of {label}, D={width}", packed_builds(setup, lengths, dtype, width),
                    base="SDPA, one by one", optional=OPTIONAL, tokens=sum(lengths),
                )  # fmt: skip


def packed_builds(setup: Setup, lengths: list[int], dtype: str, width: int) -> dict[str, Build]:
    """The contenders on the same packed tokens, (1, H, T, D)."""
    total, heads = sum(lengths), setup.pick(20, 2)
    query, key, value = (setup.draw(1, heads, total, width, dtype=dtype, seed=seed) for seed in (0, 1, 2))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(setup.device, torch.int32)

    def one_by_one() -> object:
        parts = [tensor.split(lengths, 2) for tensor in (query, key, value)]
        return torch.cat([F.scaled_dot_product_attention(*each) for each in zip(*parts, strict=True)], 2)

    def padded() -> Callable[[], object]:
        longest = max(lengths)
        batch = [
            torch.nn.utils.rnn.pad_sequence([part[0].transpose(0, 1) for part in tensor.split(lengths, 2)], True)
            .transpose(1, 2).contiguous() for tensor in (query, key, value)
        ]  # fmt: skip
        counts = torch.tensor(lengths, device=setup.device)
        keep = (torch.arange(longest, device=setup.device) < counts[:, None])[:, None, None, :]
        return lambda: F.scaled_dot_product_attention(*batch, keep)

    def turned() -> list[Tensor]:
        return [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]

    def varlen() -> Callable[[], object]:
        from torch.nn.attention.varlen import varlen_attn

        tensors, longest = turned(), max(lengths)
        return lambda: varlen_attn(*tensors, bounds, bounds, longest, longest)

    def flash_packed() -> Callable[[], object]:
        from flash_attn import flash_attn_varlen_func

        tensors, longest = turned(), max(lengths)
        return lambda: flash_attn_varlen_func(*tensors, bounds, bounds, longest, longest)

    return {
        "SDPA, one by one": lambda: one_by_one,
        "longlens": lambda: lambda: longlens.attention(query, key, value, cu_seqlens=bounds),
        "SDPA, padded": padded,
        "varlen_attn": varlen,
        "flash-attn, packed": flash_packed,
    }


# ---- every method


def run_methods(setup: Setup) -> None:
    """The step: every method beside PyTorch's fused attention, and windows beside FlexAttention."""
    for length in setup.pick((16384, 65536), (512,)):
        query, key, value = (setup.draw(1, 4, length, 64, dtype="bfloat16", seed=seed) for seed in (0, 1, 2))

        def of(method: str, length: int = length, **options: Any) -> Build:
            return lambda: attention_call(setup, method, length, backward=False, **options)

        chosen = setup.pick(METHODS, ("exact", "window:256", "linear"))
        # one at a time: all methods together would hold too much memory
        windowed = {"flex, window": flex(setup, query, key, value, "window", backward=False)}
        for method in chosen:
            setup.compare(
                f"{method}, N={length}",
                {
                    "SDPA": lambda q=query, k=key, v=value: lambda: F.scaled_dot_product_attention(q, k, v),
                    "longlens": of(method),
                    **(windowed if method == "window:256" else {}),
                },
                base="SDPA", optional=OPTIONAL,
            )  # fmt: skip
