"""The one list of methods, with parameters small enough for the tests' lengths. A new method is added here."""

from __future__ import annotations

from longlens import (
    LSH,
    BigBird,
    BlockSparse,
    CosFormer,
    Dilated,
    Exact,
    Fixed,
    Global,
    Linear,
    Linformer,
    Longformer,
    Nystrom,
    Performer,
    Random,
    Scatterbrain,
    Strided,
    Taylor,
    Window,
)
from longlens.ops.method import Method


def band(blocks: int) -> tuple[tuple[int, ...], ...]:
    """A layout: neighbouring blocks, and the first one for everyone."""
    return tuple(tuple(sorted({0, max(0, row - 1), row, min(blocks - 1, row + 1)})) for row in range(blocks))


METHODS: tuple[Method, ...] = (
    Exact(),
    Exact("blockwise"),
    Window(16),
    Window(16, 0),
    Dilated(8, 3),
    Global((0, 5)),
    Random(2, 16, seed=1),
    Strided(8),
    Fixed(8, 2),
    BlockSparse(band(64), 16),  # reaches 1,024 tokens
    LSH(2, 8),
    Longformer(16, (0,)),
    BigBird(8, 1),
    Window(16) | Global((0,)),
    Window(4) | Dilated(4, 5),
    Linear(),
    Performer(64),
    Performer(64, kernel="relu"),
    CosFormer(1024),
    Taylor(),
    Nystrom(16),
    Linformer(16),
    Scatterbrain(16, 64),
)
