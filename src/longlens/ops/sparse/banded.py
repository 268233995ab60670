"""A faster route through plain windows: overlapping views of the keys, given to PyTorch's fused kernel all at once.

Block b of R queries meets keys b R - left .. (b + 1) R + right. As views with overlapping strides, all these ranges
are one batch of small attentions that share one mask; the fused kernel runs them in a single call and nothing is
copied. On a CPU that is faster than one tile after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longlens.ops.fused_cpu import attend_cpu, cpu_serves
from longlens.ops.inputs import Inputs, wide_dtype
from longlens.ops.sparse.strata import Intervals, Stratum
from longlens.ops.tiles.grid import sparse_shape

# queries to a block: fewer waste fewer pairs, and the fused kernel takes 32 at a time here anyway
ROWS = 32
# blocks to a call
RUN = 64

HeadStart = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[int, int]]


def head_start(strata: Sequence[Stratum], inputs: Inputs) -> HeadStart | None:
    """The route for these inputs, or None where it does not serve."""
    band = strata[0].band if len(strata) == 1 and isinstance(strata[0], Intervals) else None
    serves = (
        inputs.device_type == "cpu"
        and cpu_serves(wide_dtype(inputs.query.dtype))
        and inputs.rule is None
        and inputs.key_mask is None
        and inputs.bias is None
        and inputs.softcap is None
        and inputs.sinks is None
        and inputs.value.shape[3] == inputs.query.shape[3]
    )
    if band is None or not serves:
        return None
    left, right = band
    right = 0 if inputs.causal else right
    # the backward pass rebuilds a row without its log-sum-exp only where all its keys fit one piece
    shape = sparse_shape(inputs)
    if inputs.needs_grad and shape.rows + sum(band) > shape.keys:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> tuple[int, int]:
        """Fill the rows whose whole window lies inside the keys; returns their range."""
        offset, groups = inputs.offset, inputs.groups
        # the fused kernel reads rows of adjacent numbers
        q, k, v = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (q, k, v))
        # by way of float32 also for half inputs: bands are so small that the kernel's own casts would take longer
        wide = wide_dtype(q.dtype)
        # rows in whole blocks with all their keys inside 0..Nk, starting where the tiles' blocks start
        start = -(-max(0, left - offset) // 64) * 64
        stop = min(inputs.queries, inputs.keys - right - offset)
        blocks = (stop - start) // 64 * (64 // ROWS)
        if blocks <= 0:
            return 0, 0
        stop = start + blocks * ROWS
        first, width = start + offset - left, ROWS + left + right
        distance = torch.arange(width).unsqueeze(0) - left - torch.arange(ROWS).unsqueeze(1)
        mask = torch.zeros(ROWS, width, dtype=wide).masked_fill_((distance < -left) | (distance > right), -torch.inf)
        with torch.no_grad():
            # a run of blocks at a time, so that its result is still in cache when it is copied
            for done in range(0, blocks, RUN):
                count = min(RUN, blocks - done)
                begin = start + done * ROWS
                low = first + done * ROWS
                parts = (tensor[:, low : low + (count - 1) * ROWS + width].to(wide) for tensor in (k, v))
                keys, values = (_overlapping(part, count, width) for part in parts)
                for group in range(groups):
                    rows = q[group::groups, begin : begin + count * ROWS].to(wide).unflatten(1, (count, ROWS))
                    part, _ = attend_cpu(rows, keys, values, inputs.scale, mask=mask)
                    output[group::groups, begin : begin + count * ROWS].unflatten(1, (count, ROWS)).copy_(part)
        return start, stop

    return run


def _overlapping(tensor: Tensor, blocks: int, width: int) -> Tensor:
    """(heads, N, D) as (heads, blocks, width, D): block b starts at row b ROWS. A view."""
    heads, _, depth = tensor.shape
    by_head, by_row, by_column = tensor.stride()
    return tensor.as_strided((heads, blocks, width, depth), (by_head, ROWS * by_row, by_row, by_column))
