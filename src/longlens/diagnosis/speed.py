"""What is fast here: short measurements by dtype, the kernels that there are, and what calls of attention choose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from longlens.ops.explain import Explanation, explain
from longlens.ops.fused_cpu import cpu_serves
from longlens.ops.fused_cuda import gives_lse, packs

DTYPES = ("float32", "bfloat16", "float16")
# what is measured: rows, inner and columns of a product; heads, tokens and width of attention
PRODUCT = {"cpu": (512, 512, 1024), "cuda": (4096, 4096, 4096)}
ATTENTION = {"cpu": (4, 768, 64), "cuda": (16, 4096, 64)}
# a measurement takes at most about this many seconds, or one run
SECONDS = 0.08

# the calls that models make most, by name
SHAPE = (1, 8, 16_384, 64)
CALLS: dict[str, dict[str, Any]] = {
    "one sequence": {},
    "causal": {"is_causal": True},
    "padded": {"key_mask": True},
    "with gradients": {"requires_grad": True},
}


@dataclass(frozen=True)
class Rate:
    """Billions of multiplications and additions in a second (GFLOP/s): of a matrix product, and of fused attention."""

    product: float
    attention: float


@dataclass(frozen=True)
class Kernels:
    """The fused kernels of attention of this PyTorch.

    `cpu` has the dtypes that its operator for CPUs serves, with the log-sum-exp, as checked on a small input; `cuda`
    the kernels of linear memory that serve a call in bfloat16 or float16 on the first GPU, each with what it also does
    as checked on a small input: "log-sum-exp", "packed sequences". `compiler` says whether Triton is here, by which
    PyTorch compiles for GPUs (`exact:flex`).
    """

    cpu: tuple[str, ...]
    cuda: dict[str, tuple[str, ...]]
    compiler: bool


def measure_rates(device: torch.device) -> dict[str, Rate]:
    """The rates on a device, by dtype, each the best of a few runs; a second or less in all."""
    rates = {}
    with torch.inference_mode():
        for name in DTYPES:
            dtype = getattr(torch, name)
            m, k, n = PRODUCT[device.type]
            if device.type == "cpu" and name == "float16":
                # most CPUs have no fast product of it, so that a few rows take long enough
                m //= 8
            a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((m, k), (k, n)))
            product = 2 * m * k * n / _best(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
            heads, tokens, width = ATTENTION[device.type]
            q = torch.ones(1, heads, tokens, width, dtype=dtype, device=device)
            run = lambda q=q: F.scaled_dot_product_attention(q, q, q)  # noqa: E731
            attention = 4 * heads * tokens * tokens * width / _best(run, device)
            rates[name] = Rate(product / 1e9, attention / 1e9)
    return rates


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs. The first counts only where it takes all the time that there is."""
    best, begun = float("inf"), time.perf_counter()
    for place in range(20):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended = time.perf_counter()
        late = ended - begun > SECONDS
        if place or late:
            best = min(best, ended - started)
        if late:
            break
    return best


def find_kernels() -> Kernels:
    """The kernels of this PyTorch on this machine."""
    from importlib.util import find_spec

    cpu = tuple(name for name in (*DTYPES, "float64") if cpu_serves(getattr(torch, name)))
    return Kernels(cpu, _cuda_kernels(), find_spec("triton") is not None)


def _cuda_kernels() -> dict[str, tuple[str, ...]]:
    if not torch.cuda.is_available():
        return {}
    cuda = torch.backends.cuda
    half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    q = torch.ones(1, 8, 256, 64, dtype=half, device="cuda")
    call = cuda.SDPAParams(q, q, q, None, 0.0, False, False)
    asked = {
        "flash": cuda.can_use_flash_attention,
        "efficient": cuda.can_use_efficient_attention,
        "cudnn": cuda.can_use_cudnn_attention,
    }
    return {name: tuple(_abilities(name, half, q.device)) for name, serves in asked.items() if serves(call)}


def _abilities(kernel: str, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    if gives_lse(kernel, dtype, device):
        yield "log-sum-exp"
    if kernel in ("flash", "efficient") and packs(kernel, dtype, device):
        yield "packed sequences"


def explain_calls(device: torch.device, dtype: torch.dtype) -> dict[str, Explanation]:
    """What `longlens.attention` would do with the calls that models make most, of `SHAPE`."""
    return {name: explain(SHAPE, dtype=dtype, device=device, **options) for name, options in CALLS.items()}
