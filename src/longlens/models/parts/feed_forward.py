"""Feed-forward blocks: up, a function, down; or gated, where one half of the upper product gates the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longlens.errors import InputError
from longlens.models.linear import apply_linear, apply_linear_gelu

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu, "relu": F.relu,
}  # fmt: skip


@dataclass(frozen=True)
class FeedForward:
    """down(f(up x)), or, `gated`, down(f(gate x) * up x) (Shazeer 2020, arXiv:2002.05202, section 2).

    `function`: "gelu", "gelu_tanh" (transformers' gelu_new), "silu" or "relu". Gate and up are stacked in one matrix,
    gate first, so that they are one product.
    """

    function: str = "gelu"
    gated: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        if self.function not in _FUNCTIONS:
            raise InputError(f"expected a function {', '.join(_FUNCTIONS)}, got {self.function!r}")

    def make_up(self, width: int, wide: int) -> nn.Linear:
        """(T, width) -> (T, wide), or (T, 2 wide) where gated."""
        return nn.Linear(width, (1 + self.gated) * wide, bias=self.bias)

    def make_down(self, width: int, wide: int) -> nn.Linear:
        """(T, wide) -> (T, width)."""
        return nn.Linear(wide, width, bias=self.bias)

    def __call__(self, up: nn.Linear, down: nn.Linear, x: Tensor) -> Tensor:
        """(T, width) -> (T, width)."""
        return apply_linear(down, self._hidden(up, x))

    def _hidden(self, up: nn.Linear, x: Tensor) -> Tensor:
        function = _FUNCTIONS[self.function]
        if not self.gated:
            return apply_linear_gelu(up, x) if self.function == "gelu" else function(apply_linear(up, x))
        gate, value = apply_linear(up, x).chunk(2, -1)
        gated = function(gate)
        return gated * value if torch.is_grad_enabled() else gated.mul_(value)

    def count(self, width: int, wide: int) -> int:
        """The number of parameters."""
        ups = 1 + self.gated
        return (ups + 1) * width * wide + self.bias * (ups * wide + width)

    @property
    def activations(self) -> int:
        """Numbers held for each token at a time, in units of `wide`."""
        return 3 if self.gated else 2
