"""The lens, embedding and contact maps: models with random weights, packed, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import longlens
from checkpoints import untrained
from gpu_steps.memory import STANDARD, grown, scan_call
from gpu_steps.setup import Setup
from longlens.lens import Entropy, Pooled, Received, TopKeys

LETTERS = "LAGVSERTIDPKQNFYMHWC"


def run_lens(setup: Setup) -> None:
    """The step: a scan with the standard set beside attention itself, and each statistic alone."""
    sets: dict[str, tuple[Any, ...]] = {
        "standard set": STANDARD,
        "entropy": (Entropy(),),
        "received": (Received(),),
        "top 8 keys": (TopKeys(8),),
        "map in 256 x 256 cells": (Pooled(256),),
    }
    setup.measure("launches of a scan", lambda: launches(setup))
    for dtype in setup.pick(("float32", "bfloat16"), ("float32",)):
        shapes = ((8, 20, 1024, 32), (1, 20, 8192, 64), (1, 8, 32768, 64))
        for shape in setup.pick(shapes, ((1, 2, 64, 16),)):
            query, key, value = (setup.draw(*shape, dtype=dtype, seed=seed) for seed in (0, 1, 2))

            def scanning(
                collect: tuple[Any, ...], query: torch.Tensor = query, key: torch.Tensor = key
            ) -> Callable[[], Callable[[], object]]:
                return lambda: lambda: longlens.scan(query, key, collect=collect)

            setup.compare(
                f"scan {dtype} {shape}",
                {
                    "SDPA": lambda q=query, k=key, v=value: lambda: F.scaled_dot_product_attention(q, k, v),
                    **{name: scanning(collect) for name, collect in sets.items()},
                },
                base="SDPA", rounds=5,
            )  # fmt: skip


def launches(setup: Setup) -> dict[str, Any]:
    """Kernels and waits of one scan of 20 heads at N = 1,024."""
    query, key = (setup.draw(1, *setup.pick((20, 1024, 32), (2, 64, 16)), dtype="bfloat16", seed=s) for s in (0, 1))
    return profiled(setup, lambda: longlens.scan(query, key, collect=STANDARD))


def profiled(setup: Setup, call: Callable[[], object], top: int = 15) -> dict[str, Any]:
    """The kernels that take the most time, and how many there are."""
    from torch.profiler import ProfilerActivity, profile

    call()
    cuda = setup.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        call()
        if cuda:
            torch.cuda.synchronize()
    # names of the sums differ between versions
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, field, 0.0))
    counts = {event.key: event.count for event in events}
    return {
        "top": [[event.key[:60], event.count, round(getattr(event, field, 0.0))] for event in events[:top]],
        "launches": counts.get("cudaLaunchKernel", 0) + counts.get("cuLaunchKernel", 0),
        "synchronisations": counts.get("cudaStreamSynchronize", 0) + counts.get("cudaDeviceSynchronize", 0),
    }


def proteins(setup: Setup, tokens: int) -> list[str]:
    """Made-up proteins of 50 to 900 residues, about `tokens` in all."""
    generator = torch.Generator().manual_seed(4)
    low, high = setup.pick((50, 900), (5, 20))
    texts: list[str] = []
    while sum(map(len, texts)) < tokens:
        length = int(torch.randint(low, high, (1,), generator=generator))
        texts.append("".join(LETTERS[i] for i in torch.randint(20, (length,), generator=generator).tolist()))
    return texts


def run_embedding(setup: Setup) -> None:
    """The step: tokens a second of packed models; one by one, watched, and the kernels that take the time."""
    for name in setup.pick(("650M", "35M", "150M"), ("dry",)):
        try:
            model = untrained(name).to(setup.device, torch.bfloat16)
        except Exception as error:
            setup.fail(f"ESM-2 {name}", error)
            continue
        texts = proteins(setup, setup.pick(32_768, 60))
        packed, alone = model.pack(texts), [model.pack([text]) for text in texts]
        few = texts[: max(1, len(texts) // 4)]
        some = model.pack(few)

        def whole(packed: Any = packed, model: Any = model) -> object:
            with torch.inference_mode():
                return model(packed).last

        def one_by_one(alone: Any = alone, model: Any = model) -> object:
            with torch.inference_mode():
                return [model(each).last for each in alone]

        setup.compare(
            f"ESM-2 {name}, bfloat16", {"packed": lambda: whole, "one by one": lambda: one_by_one}, base="packed",
            rounds=5, tokens=int(packed.cu_seqlens[-1]), proteins=len(texts),
        )  # fmt: skip

        setup.measure(f"ESM-2 {name}, kernels", lambda call=whole: profiled(setup, call))

        def plain(some: Any = some, model: Any = model) -> object:
            with torch.inference_mode():
                return model(some).last

        def watched(some: Any = some, model: Any = model) -> object:
            with torch.inference_mode(), longlens.watch(model, collect=list(STANDARD)):
                return model(some).last

        setup.compare(
            f"ESM-2 {name}, bfloat16, watched", {"packed": lambda: plain, "with the standard set": lambda: watched},
            base="packed", rounds=3, tokens=int(some.cu_seqlens[-1]), proteins=len(few),
        )  # fmt: skip
        setup.measure(f"ESM-2 {name}, peak", lambda call=whole: {"growth_mib": setup.growth(call) / 2**20})
        del model, packed, alone, some


def run_contacts(setup: Setup) -> None:
    """The step: a contact map of 1,022 residues, its memory at twice the length, and the lens's memory on a model."""
    lengths = setup.pick((1022, 2044), (20, 40))
    texts = {length: (LETTERS * (length // 20 + 1))[:length] for length in lengths}
    for name in setup.pick(("650M", "150M"), ("dry",)):
        try:
            model = untrained(name).to(setup.device, torch.bfloat16)
        except Exception as error:
            setup.fail(f"ESM-2 {name}", error)
            continue

        def maps(length: int, model: Any = model) -> Callable[[], object]:
            return lambda: model.predict_contacts([texts[length]])

        def forward(length: int, model: Any = model) -> Callable[[], object]:
            packed = model.pack([texts[length]])

            def call() -> object:
                with torch.inference_mode():
                    return model(packed).last

            return call

        setup.compare(
            f"ESM-2 {name}, {lengths[0]} residues",
            {"the model alone": partial(forward, lengths[0]), "with contacts": partial(maps, lengths[0])},
            base="the model alone", rounds=5,
        )  # fmt: skip
        # the map itself is N x N: 4 times is right, layers x heads times that is not
        setup.measure(f"ESM-2 {name}, memory", lambda maps=maps: {**grown(setup, lengths, maps), "ok": None})
        del model
    long = setup.pick((8192, 16384), (64, 128))
    setup.measure("scan, memory", lambda: grown(setup, long, lambda n: scan_call(setup, n)))
