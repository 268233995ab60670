"""Peak memory at N and 2N of every method, of the lens and of contact maps: linear is at most 2.1 times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import longlens
from gpu_steps.setup import Setup, gradients
from longlens.errors import LonglensError
from longlens.lens import Distance, Entropy, Largest, LogSumExp, Received, TopKeys
from longlens.testing import claims_of

LINEAR = 2.1
METHODS = (
    "exact", "window:256", "dilated:256,dilation=4", "global:(0,)", "random:3,64", "strided:128", "fixed:128", "lsh",
    "longformer:256,global_tokens=(0,)", "bigbird:block=64,random=3", "linear", "performer:256", "taylor", "nystrom:64",
    "linformer:256", "scatterbrain",
)  # fmt: skip


def run(setup: Setup) -> None:
    """The step."""
    lengths = setup.pick((16384, 32768), (64, 128))
    for method in setup.pick(METHODS, ("window:256",)):
        modes: list[tuple[str, dict[str, Any]]] = [("", {}), (", padding", {"padding": True})]
        if claims_of(method).causal is not None:
            modes.append((", causal", {"is_causal": True}))
        for label, options in modes:
            for backward in (False, True):
                name = f"{method}{label}, {'forward and backward' if backward else 'forward'}"
                setup.measure(
                    name,
                    lambda method=method, options=options, backward=backward: grown(
                        setup, lengths, lambda n: attention_call(setup, method, n, backward=backward, **options)
                    ),
                )
    for label, options in (("dropout", {"dropout_p": 0.1}), ("value width 32", {"value_width": 32})):
        setup.measure(
            f"exact, {label}, forward and backward",
            lambda options=options: grown(
                setup, lengths, lambda n: attention_call(setup, "exact", n, backward=True, **options)
            ),
        )
    setup.measure("SDPA, forward", lambda: grown(setup, lengths, lambda n: sdpa_call(setup, n)))
    setup.measure("lens, standard set", lambda: grown(setup, lengths, lambda n: scan_call(setup, n)))


def grown(setup: Setup, lengths: tuple[int, int], build: Callable[[int], Callable[[], object]]) -> dict[str, Any]:
    """Growth at both lengths, and whether it is linear."""
    small, large = (setup.growth(build(length)) for length in lengths)
    # a MiB of the allocator's own rounding is not growth of the method
    times = large / max(small, 2**20)
    # short lengths say nothing of growth
    linear = None if setup.dry else times <= LINEAR
    return {"lengths": lengths, "mib": [small / 2**20, large / 2**20], "times": times, "ok": linear}


def attention_call(
    setup: Setup,
    method: str,
    length: int,
    *,
    backward: bool,
    padding: bool = False,
    value_width: int = 64,
    **options: Any,
) -> Callable[[], object]:
    """A call of `longlens.attention` on (1, 4, length, 64), bfloat16."""
    query, key = (setup.draw(1, 4, length, 64, dtype="bfloat16", seed=seed, grad=backward) for seed in (0, 1))
    value = setup.draw(1, 4, length, value_width, dtype="bfloat16", seed=2, grad=backward)
    if padding:
        options["key_mask"] = (torch.arange(length, device=setup.device) < length - length // 8).unsqueeze(0)

    def call() -> torch.Tensor:
        output = longlens.attention(query, key, value, method=method, **options)
        if isinstance(output, tuple):
            raise LonglensError("expected a tensor, got a pair")
        return output

    return gradients(call, (query, key, value)) if backward else call


def sdpa_call(setup: Setup, length: int) -> Callable[[], object]:
    """PyTorch's fused attention on the same shape."""
    query, key, value = (setup.draw(1, 4, length, 64, dtype="bfloat16", seed=seed) for seed in (0, 1, 2))
    return lambda: F.scaled_dot_product_attention(query, key, value)


STANDARD = (LogSumExp(), Entropy(), Largest(), Distance(), Received(), TopKeys(8))


def scan_call(setup: Setup, length: int) -> Callable[[], object]:
    """The lens's standard set on the same shape."""
    query, key = (setup.draw(1, 4, length, 64, dtype="bfloat16", seed=seed) for seed in (0, 1))
    return lambda: longlens.scan(query, key, collect=STANDARD)
