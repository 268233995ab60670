"""Paired timing: contenders do the same work in turn, round after round, in an order that rotates.

A speed is compared by the ratio of two contenders within a round; its median and range over the rounds are what is
reported, so that drift of the machine does not count for or against anyone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def clock(device: str = "cpu") -> Callable[[], float]:
    """A clock in seconds; on a GPU it waits for what was started."""
    if device != "cuda":
        return time.perf_counter
    import torch

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def order_of(names: Sequence[str], turn: int) -> list[str]:
    """The contenders of round `turn`: each begins in its turn, and every second lap runs backwards."""
    place = turn % len(names) if names else 0
    rotated = [*names[place:], *names[:place]]
    return rotated if (turn // max(1, len(names))) % 2 == 0 else rotated[::-1]


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_ups: int = 1,
    device: str = "cpu",
    deadline: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call, round after round; warm-up rounds are not counted.

    `deadline` (of `time.monotonic`) ends it after the round that passes it, so that all have the same rounds.
    """
    now = clock(device)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_ups + rounds):
        if turn > warm_ups and deadline is not None and time.monotonic() > deadline:
            break
        for name in order_of(list(calls), turn):
            begun = now()
            calls[name]()
            seconds = now() - begun
            if turn >= warm_ups:
                taken[name].append(seconds)
    return taken


def ratio(others: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Of seconds in the same rounds: how many times as fast `ours` is, the median and the range over the rounds."""
    apart = [other / own for other, own in zip(others, ours, strict=True)]
    return {"ratio": statistics.median(apart), "ratio_low": min(apart), "ratio_high": max(apart)}


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of seconds, and how many there are."""
    return {"median_s": statistics.median(times), "low_s": min(times), "high_s": max(times), "repeats": len(times)}
