"""Error of the approximators against exact softmax attention: the table in docs/methods.

    python benchmarks/approximation_error.py

"normal": queries and keys of independent N(0, 1) entries times s. "smooth": queries and keys are sines of position at
four wavelengths (1 to 8 hundred tokens) beside normal entries times 0.3, so that near tokens are alike; scale 1.
B = 1, H = 4, N = 1024, D = Dv = 64 ("smooth": 16), float64, relative Frobenius error of the output, median of 5 draws.
"""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor

from longlens import attention
from longlens.testing import Request, softmax_definition

METHODS = (
    "linear", "cosformer", "taylor", "performer:64", "performer:256", "performer:1024", "performer:4096",
    "performer:256,kernel=relu", "nystrom:64", "nystrom:256", "linformer:64", "linformer:256", "scatterbrain:64",
    "scatterbrain:256",
)  # fmt: skip
LENGTH, HEADS, DRAWS = 1024, 4, 5


def normal(size: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Query, key, value and scale."""
    query, key, value = torch.randn(3, 1, HEADS, LENGTH, 64, dtype=torch.float64)
    return query * size, key * size, value, 64**-0.5


def smooth() -> tuple[Tensor, Tensor, Tensor, float]:
    """Query, key, value and scale."""
    angles = torch.arange(LENGTH, dtype=torch.float64).unsqueeze(1) / torch.tensor([16.0, 32.0, 64.0, 128.0])
    place = torch.cat([angles.cos(), angles.sin()], -1).expand(1, HEADS, LENGTH, 8)
    tokens = torch.cat([place, 0.3 * torch.randn(1, HEADS, LENGTH, 8, dtype=torch.float64)], -1)
    return tokens, tokens, torch.randn(1, HEADS, LENGTH, 16, dtype=torch.float64), 1.0


def main() -> None:
    """Print the table."""
    kinds = {f"normal, s = {size}": (normal, (size,)) for size in (0.25, 0.5, 1.0)} | {"smooth": (smooth, ())}
    table: dict[str, list[str]] = {name: [] for name in ("mean of the values", *METHODS)}
    for draw, arguments in kinds.values():
        errors_of: dict[str, list[float]] = {name: [] for name in table}
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            query, key, value, scale = draw(*arguments)
            exact = softmax_definition(Request(query, key, value, scale=scale))
            for name in table:
                if name in METHODS:
                    output = attention(query, key, value, scale=scale, method=name)
                else:
                    output = value.mean(2, keepdim=True).expand_as(exact)
                errors_of[name].append(float((output - exact).norm() / exact.norm()))
        for name, errors in errors_of.items():
            table[name].append(f"{median(errors):.2g}")
    print("| |", " | ".join(kinds), "|\n|---|" + "---|" * len(kinds))
    for name, cells in table.items():
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
