"""The learned projections of Linformer, as parameters."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from longlens.errors import MethodError
from longlens.ops.approximate.linformer import Linformer
from longlens.ops.method import check_count


@final
class LinformerProjections(nn.Module):
    """E and F of Linformer, (rank, length) or, with `heads`, (heads, rank, length); `method()` attends with them.

        out = longlens.attention(q, k, v, method=projections.method())

    Wang et al. 2020, arXiv:2006.04768: entries start as N(0, 1 / rank). `shared` keeps one matrix for keys and values,
    `heads` gives each key head its own; one module used in every layer is the paper's layerwise sharing.

    Raises `MethodError` if a size is not an int of at least 1.
    """

    def __init__(self, length: int, rank: int = 256, heads: int | None = None, shared: bool = False) -> None:
        super().__init__()
        check_count("LinformerProjections", "length", length)
        check_count("LinformerProjections", "rank", rank)
        if heads is not None:
            check_count("LinformerProjections", "heads", heads)
        if rank > length:
            raise MethodError(f"LinformerProjections: expected rank <= length, got rank {rank} and length {length}")
        self.rank = rank
        shape = (rank, length) if heads is None else (heads, rank, length)
        self.key_projection = nn.Parameter(torch.empty(shape))
        self.value_projection = None if shared else nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new random projections."""
        for matrix in self.parameters():
            nn.init.normal_(matrix, std=self.rank**-0.5)

    def method(self) -> Linformer:
        """Linformer with these projections; gradients reach them."""
        other: Tensor | None = self.value_projection
        return Linformer(self.rank, self.key_projection, other)
