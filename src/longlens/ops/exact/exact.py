"""The exact method: which of its paths runs, in one readable function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from longlens.errors import MethodError, UnsupportedError
from longlens.ops.exact import flex, packed, sdpa, toeplitz
from longlens.ops.inputs import Inputs, wide_dtype
from longlens.ops.method import Method, Tiled
from longlens.ops.outputs import AttentionOutput
from longlens.ops.reference import softmax_attention
from longlens.ops.tiles.dense import dense_tiles
from longlens.ops.tiles.engine import attend_tiles
from longlens.ops.tiles.grid import TileShape, dense_shape, tile_elements
from longlens.ops.tiles.problem import TiledProblem

PATHS = ("sdpa", "toeplitz", "blockwise", "flex", "math")
# the paths to try, first to last; never "math", which is quadratic. The fused kernels come first: they sum in float32
# whatever the inputs' dtype, and are the fastest that do
ORDER = ("sdpa", "toeplitz", "blockwise")


@final
@dataclass(frozen=True)
class Exact(Method):
    """Softmax attention over every allowed pair, in linear memory.

        output_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j

    Rabe & Staats 2021 (arXiv:2112.05682); FlashAttention, Dao et al. 2022 (arXiv:2205.14135). Time N^2 D, memory N.

    `path`: "auto" takes the first that serves the request, in the order of `ORDER`. "sdpa" is PyTorch's fused kernel,
    "toeplitz" the same with a bias of distances (on a CPU), "blockwise" our tiles, "flex" compiled FlexAttention
    (forward only on a CPU), "math" the N x N definition in plain operations, never chosen by itself: quadratic memory,
    but derivatives of every order.
    """

    path: str = "auto"
    name: ClassVar[str] = "exact"

    def __post_init__(self) -> None:
        if self.path not in ("auto", *PATHS):
            raise MethodError(f"exact: expected path to be one of {('auto', *PATHS)}, got {self.path!r}")

    def attend(self, inputs: Inputs) -> AttentionOutput:
        """Run the chosen path."""
        path = choose_path(inputs) if self.path == "auto" else self.path
        if path == "sdpa":
            return sdpa.attend(inputs)
        if path == "toeplitz":
            return toeplitz.attend(inputs)
        if path == "flex":
            return flex.attend(inputs)
        if path == "math":
            return attend_math(inputs)
        return attend_tiles(TiledProblem(inputs, lambda shapes, _: dense_tiles(shapes), dense_shape(inputs).scores))

    def attend_packed(self, inputs: Inputs) -> AttentionOutput | None:
        """All sequences by one kernel of PyTorch's, on CUDA, where one serves (`longlens.ops.exact.packed`)."""
        return packed.attend(inputs) if self.path in ("auto", "sdpa") else None

    def tiles(self, inputs: Inputs, shape: TileShape) -> Tiled:
        """All pairs that the masks leave."""
        return Tiled(inputs, dense_tiles(inputs, shape))

    def reference(self, inputs: Inputs) -> Tensor:
        """`longlens.ops.reference.softmax_attention`."""
        return softmax_attention(inputs)[0]

    def peak_elements(self, inputs: Inputs) -> int:
        """Scores of one group of heads for the tiles; what zero padding copies for the fused kernel."""
        path = choose_path(inputs) if self.path == "auto" else self.path
        batch, heads, queries, _ = inputs.query.shape
        if path == "math":
            return 3 * batch * heads * queries * inputs.keys
        if path == "blockwise":
            shape = dense_shape(inputs)
            return tile_elements(inputs, shape, min(inputs.keys, shape.keys))
        if path == "toeplitz":
            return toeplitz.scratch_elements(inputs)
        return sdpa.scratch_elements(inputs) if path == "sdpa" else 0

    def refusals(self, inputs: Inputs) -> list[str]:
        """What a path that was named by hand cannot do."""
        return [] if self.path == "auto" else [f"path '{self.path}': {r}" for r in path_refusals(inputs)[self.path]]


def path_refusals(inputs: Inputs) -> dict[str, list[str]]:
    """For each path, why it cannot serve the inputs; empty lists for those that can."""
    return {path: refuse(inputs) for path, refuse in REFUSALS.items()}


REFUSALS: dict[str, Callable[[Inputs], list[str]]] = {
    "sdpa": sdpa.refusals,
    "toeplitz": toeplitz.refusals,
    "flex": flex.refusals,
    "blockwise": lambda _: [],
    "math": lambda inputs: ["it has no dropout"] if inputs.dropout else [],
}


def choose_path(inputs: Inputs) -> str:
    """The first path of `ORDER` that refuses nothing."""
    return next(path for path in ORDER if not REFUSALS[path](inputs))


def attend_math(inputs: Inputs) -> AttentionOutput:
    """The definition, computed in float64 with N x N memory and returned in the inputs' dtype; it can be differentiated
    any number of times."""
    if inputs.dropout:
        raise UnsupportedError("exact:path=math has no dropout; use exact")
    output, lse = softmax_attention(inputs)
    wide = wide_dtype(inputs.query.dtype)
    return AttentionOutput(output.to(inputs.query.dtype), lse.to(wide) if inputs.need_lse else None)
