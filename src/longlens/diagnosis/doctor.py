"""`doctor`: one look at the installation and the machine, with what is wrong and what would help."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longlens.diagnosis.machine import Machine, inspect_machine
from longlens.diagnosis.models import LocalModel, find_models, hub_cache
from longlens.diagnosis.packages import Package, Packages, find_packages, install_command, installed_version

if TYPE_CHECKING:
    from longlens.diagnosis.speed import Kernels, Rate
    from longlens.ops.explain import Explanation

# below this much free memory a process with PyTorch and a small model hardly starts
LEAST_MEMORY = 2**30
# bfloat16 is worth the mention where its products are this many times as fast as those of float32
WORTH = 1.3
# how a model is used, as `LocalModel.served` says it
USED = {"load": "", "attach": "; not for load, but longlens.hf.attach may take it", "": "; incomplete"}
# models of the cache that the text lists
SHOWN = 12


@dataclass(frozen=True)
class Diagnosis:
    """What `longlens.doctor` found. `print` shows it as text; `dataclasses.asdict` gives plain values.

    `problems` are what keeps commands from running, each with what to do; `advice` is what would make them faster or
    possible. `device` is the one that "auto" chooses. `rates` (by dtype), `kernels` and `calls` are those of this
    device, and empty or None where PyTorch cannot be imported.
    """

    longlens: str
    python: str
    torch: str
    device: str
    dtype: str
    packages: Packages
    machine: Machine
    rates: dict[str, Rate]
    kernels: Kernels | None
    calls: dict[str, Explanation]
    models: tuple[LocalModel, ...]
    cache: str
    offline: bool
    problems: tuple[str, ...]
    advice: tuple[str, ...]

    def __str__(self) -> str:
        lines = [line for part in (_software, _hardware, _speed, _choices, _local) for line in part(self)]
        lines += [f"problem   {text}" for text in self.problems] or ["problems  none"]
        return "\n".join(lines + [f"advice    {text}" for text in self.advice])


def doctor() -> Diagnosis:
    """Versions, extras, devices, what is fast here, what calls of attention would choose, models without a download.

    Takes a second or two, of which one is the import of PyTorch; needs no network and runs no model. Works, with less
    to say, where PyTorch is missing or broken.
    """
    torch, broken = _import_torch()
    packages, machine = find_packages(), inspect_machine(torch)
    rates: dict[str, Rate] = {}
    calls: dict[str, Explanation] = {}
    kernels, device, dtype = None, "", ""
    if torch is not None:
        from longlens.diagnosis.speed import explain_calls, find_kernels, measure_rates

        chosen, kind = _chosen(torch)
        device, dtype = chosen.type, str(kind).removeprefix("torch.")
        rates, kernels, calls = measure_rates(chosen), find_kernels(), explain_calls(chosen, kind)
    return Diagnosis(
        longlens=installed_version("longlens") or "not installed",
        python=platform.python_version(),
        torch="" if torch is None else str(torch.__version__),
        device=device,
        dtype=dtype,
        packages=packages,
        machine=machine,
        rates=rates,
        kernels=kernels,
        calls=calls,
        models=() if torch is None else find_models(),
        cache=str(hub_cache()),
        offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"),
        problems=tuple(_problems(packages, broken)),
        advice=tuple(_advice(torch, machine, device, rates, kernels)),
    )


def _import_torch() -> tuple[Any, str]:
    """PyTorch, or None and why it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        # OSError: a library that it loads is missing or of another kind
        return None, str(error) or type(error).__name__
    return torch, ""


def _chosen(torch: Any) -> tuple[Any, Any]:
    """The device and dtype that `longlens.load` chooses for "auto", without the second that importing it takes."""
    cuda = torch.cuda.is_available()
    half = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if half else torch.float32


def _problems(packages: Packages, broken: str) -> Iterator[str]:
    if broken:
        yield f"PyTorch cannot be imported ({broken}); pip install --force-reinstall torch"
    wrong = [package for package in packages.required if package.state != "present"]
    if wrong:
        yield f"{', '.join(map(str, wrong))}; {install_command(wrong)}"
    for name, members in packages.extras.items():
        old = [package for package in members if package.state == "too old"]
        if old:
            yield f"extra {name}: {', '.join(map(str, old))}; {install_command(old)}"


def _advice(
    torch: Any, machine: Machine, device: str, rates: dict[str, Rate], kernels: Kernels | None
) -> Iterator[str]:
    if torch is None:
        return
    if machine.driver and not machine.gpus:
        build = "is a build for CPUs" if torch.version.cuda is None else "cannot use it"
        yield (
            f"a driver of NVIDIA's GPUs is here, but this PyTorch ({torch.__version__}) {build}: to use the GPU, "
            "install PyTorch as pytorch.org says for the driver's version of CUDA"
        )
    if device == "cpu" and torch.backends.mps.is_available():
        yield "this machine has an Apple GPU (mps): longlens chooses the CPU unless it is told --device mps"
    if machine.threads is not None and machine.threads > machine.cores:
        yield (
            f"PyTorch uses {machine.threads} threads and this process may use {machine.cores} cores: in Python, set "
            f"OMP_NUM_THREADS={machine.cores} before torch is imported; the commands do so themselves"
        )
    if machine.free < LEAST_MEMORY:
        yield f"only {_gib(machine.free)} of memory are free: end other programs, or give --max-memory"
    if device == "cpu" and kernels is not None and "float32" not in kernels.cpu:
        yield (
            "this PyTorch has no fused CPU attention that passes our check, so that exact attention runs in tiles, "
            "which is slower; longlens is tested with the newest PyTorch"
        )
    faster = _ratio(rates)
    if device == "cpu" and faster >= WORTH:
        yield (
            f"--dtype bfloat16 computes matrix products {faster:.1f} times as fast as float32 here, with half the "
            "memory for weights and less exact results"
        )


def _ratio(rates: dict[str, Rate]) -> float:
    """How many times as fast products are in bfloat16 as in float32."""
    return rates["bfloat16"].product / rates["float32"].product if rates else 0.0


def _software(found: Diagnosis) -> Iterator[str]:
    torch = f"PyTorch {found.torch}" if found.torch else "no PyTorch"
    yield f"longlens  {found.longlens}, Python {found.python}, {torch}"
    required = found.packages.required
    if required:
        yield f"needs     {', '.join(str(package) for package in required if package.name != 'torch')}"
    else:
        yield "needs     unknown: longlens runs from a source tree that is not installed"
    label = "extras"
    for name, members in found.packages.extras.items():
        yield f"{label:<10}{name:<11}{_extra(name, members)}"
        label = ""


def _extra(name: str, members: tuple[Package, ...]) -> str:
    text = ", ".join(map(str, members))
    missing = any(package.state == "missing" for package in members)
    return f"{text}: pip install 'longlens[{name}]'" if missing else text


def _hardware(found: Diagnosis) -> Iterator[str]:
    machine = found.machine
    threads = "" if machine.threads is None else f", {_count(machine.threads, 'thread')}"
    yield f"system    {machine.system}"
    yield f"CPU       {', '.join((machine.cpu, _count(machine.cores, 'core') + threads, *machine.instructions))}"
    yield f"memory    {_gib(machine.memory)}, of which {_gib(machine.free)} are free"
    for gpu in machine.gpus:
        memory = f"{_gib(gpu.memory)}, of which {_gib(gpu.free)} are free"
        yield f"GPU       {gpu.name}, capability {gpu.capability}, {memory}"
    if not machine.gpus:
        yield "GPU       none that PyTorch can use"


def _speed(found: Diagnosis) -> Iterator[str]:
    if not found.rates or found.kernels is None:
        return
    yield f"device    {found.device}, {found.dtype}: what auto chooses"
    for label, name in (("products", "product"), ("attention", "attention")):
        each = ", ".join(f"{dtype} {_digits(getattr(rate, name))}" for dtype, rate in found.rates.items())
        yield f"{label:<10}{each} GFLOP/s"
    served = ", ".join(found.kernels.cpu)
    yield f"kernels   CPU: {f'fused, with log-sum-exp, in {served}' if served else 'none that passes our check'}"
    if found.device == "cuda":
        flex = "exact:flex can compile" if found.kernels.compiler else "no Triton, so that exact:flex cannot compile"
        names = (f"{name} ({', '.join(also)})" if also else name for name, also in found.kernels.cuda.items())
        yield f"          CUDA: {', '.join(names) or 'none of linear memory'}; {flex}"


def _choices(found: Diagnosis) -> Iterator[str]:
    label = "calls"
    for name, call in found.calls.items():
        if label:
            size = call.request.partition(",  ")[0]
            yield f"{label:<10}of longlens.attention, {size.partition(' key')[0].rstrip(',')}"
            label = ""
        yield f"          {name:<16}{call.method}: {call.path}, {_bytes(call.peak_bytes)} beyond the inputs"


def _local(found: Diagnosis) -> Iterator[str]:
    hub = installed_version("huggingface_hub")
    state = "is switched off by HF_HUB_OFFLINE" if found.offline else f"by huggingface_hub {hub}"
    yield f"hub       {state if hub else 'no: ' + HUB_MISSING}; its cache is {found.cache}"
    label = "models"
    for model in found.models[:SHOWN]:
        size = f", {_bytes(model.bytes)}" if model.bytes else ""
        how = {"load": "", "attach": "; not for load, but longlens.hf.attach may take it", "": "; incomplete"}[
            model.served
        ]
        yield f"{label:<10}{model.name}: {model.note}{size}{how}"
        label = ""
    if len(found.models) > SHOWN:
        yield f"          and {len(found.models) - SHOWN} more"


HUB_MISSING = "pip install 'longlens[hub]'"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _digits(value: float) -> str:
    """Two digits at least: 1,234, 12, 0.31."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _gib(count: int) -> str:
    """Without PyTorch, which `_bytes` imports."""
    return f"{count / 2**30:.1f} GiB"


def _bytes(count: int) -> str:
    from longlens.ops.explain import format_bytes

    return format_bytes(count)
