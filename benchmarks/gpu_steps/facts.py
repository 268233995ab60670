"""What the machine is, its ceilings, and which kernels of PyTorch exist on it."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Callable
from typing import Any

import torch

import longlens
from gpu_steps.setup import Setup
from harness import clock, cores, facts, product_rate, versions


def run(setup: Setup) -> None:
    """The step."""
    setup.measure("machine", lambda: machine(setup))
    setup.measure("clocks", clocks, optional=True)
    size = setup.pick(8192, 64)
    for dtype in ("bfloat16", "float16", "float32"):
        setup.measure(
            f"product {size}^3, {dtype}",
            lambda dtype=dtype: {"tflops": product_rate(dtype, (size, size, size), setup.device) / 1e3},
        )
    setup.measure("product in tf32", lambda: tf32(setup, size))
    setup.measure("copy", lambda: copy(setup))
    setup.measure("launch of an empty kernel", lambda: launch(setup))
    for dtype in ("bfloat16", "float32"):
        for width in (16, 20, 24, 32, 64, 128):
            setup.measure(
                f"kernels for {dtype}, width {width}", lambda dtype=dtype, width=width: kernels(setup, dtype, width)
            )
    setup.measure("signatures", signatures)


def machine(setup: Setup) -> dict[str, Any]:
    """Versions, and properties of the device."""
    about = facts(setup.device) | {"cores": cores()}
    about["packages"] |= versions(("triton", "flash-attn", "flash-attn-3", "xformers"))
    about["cuda"] = torch.version.cuda
    if setup.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "capability": torch.cuda.get_device_capability(), "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gib": properties.total_memory / 2**30, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return about


def clocks() -> dict[str, Any]:
    """What nvidia-smi says."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,driver_version"
    call = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    told = subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    return dict(zip(fields.split(","), told, strict=False))


def tf32(setup: Setup, size: int) -> dict[str, Any]:
    """A float32 product with tensor cores allowed to round its factors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return {"tflops": product_rate("float32", (size, size, size), setup.device) / 1e3}
    finally:
        torch.set_float32_matmul_precision(before)


def best(setup: Setup, call: Callable[[], object], count: int) -> float:
    """Seconds of a call, the best of five timings of `count` calls in a row."""
    now = clock(setup.device)
    call()
    quickest = float("inf")
    for _ in range(5):
        begun = now()
        for _ in range(count):
            call()
        quickest = min(quickest, (now() - begun) / count)
    return quickest


def copy(setup: Setup) -> dict[str, Any]:
    """Bandwidth of a copy on the device: read and written bytes."""
    source = setup.draw(setup.pick(2**28, 2**12))
    target = torch.empty_like(source)
    return {"gb_per_s": 2 * source.nbytes / best(setup, lambda: target.copy_(source), 4) / 1e9}


def launch(setup: Setup) -> dict[str, Any]:
    """Time of a call that does nothing."""
    one = setup.draw(1)
    return {"us": best(setup, lambda: one.add_(0.0), setup.pick(1000, 10)) * 1e6}


def kernels(setup: Setup, dtype: str, width: int) -> dict[str, Any]:
    """Which of PyTorch's fused kernels would take plain, padded and causal calls, and what longlens chooses."""
    from torch.backends import cuda

    n = setup.pick(1024, 64)
    query = setup.draw(1, 4, n, width, dtype=dtype)
    mask = torch.ones(1, 1, 1, n, dtype=torch.bool, device=setup.device)
    taking: dict[str, Any] = {}
    for case, attn_mask, causal in (("plain", None, False), ("padded", mask, False), ("causal", None, True)):
        asked = cuda.SDPAParams(query, query, query, attn_mask, 0.0, causal, False)
        taking[case] = [
            name for name in ("flash", "efficient", "cudnn")
            if getattr(cuda, f"can_use_{name}_attention")(asked, False)
        ]  # fmt: skip
    explanation = longlens.explain(query)
    return taking | {
        "longlens": explanation.path,
        "why_not": {path: list(why) for path, why in explanation.why_not.items()},
    }


def signatures() -> dict[str, Any]:
    """Which arguments exist here."""
    arguments = {"attention": list(inspect.signature(longlens.attention).parameters)}
    try:
        from torch.nn.attention.varlen import varlen_attn

        arguments["varlen_attn"] = list(inspect.signature(varlen_attn).parameters)
    except ImportError:
        arguments["varlen_attn"] = []
    return arguments
