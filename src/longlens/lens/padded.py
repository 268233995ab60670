"""How much of the attention matrix is scanned at a time, and packed sequences laid together in padded batch rows.

A CPU takes blocks that stay in its cache, and one sequence after the other. A GPU takes far larger ones: a launch of a
kernel takes as long as some million scores do, so that many short sequences are laid together, each in a row of its
own that is padded to the longest. Padding is masked, as queries and as keys: no weight is on it, and the statistics are
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longlens.lens.block import Places
from longlens.ops.exact.exact import Exact
from longlens.ops.inputs import Inputs
from longlens.ops.masks import Rule, TensorMask
from longlens.ops.method import Method


@dataclass(frozen=True)
class ScanShape:
    """Queries to a block, scores computed at a time (over heads), and whether sequences are laid together."""

    rows: int
    scores: int
    together: bool


# on a CPU scores and what is made of them stay in the second-level cache; on a GPU they take 128 MiB, several times
SHAPES = {"cpu": ScanShape(64, 2**20, together=False)}
ACCELERATOR = ScanShape(1024, 2**25, together=True)
# tokens of padding that are not counted
FREE = 4096


def scan_shape(device_type: str) -> ScanShape:
    """The shape for a device."""
    return SHAPES.get(device_type, ACCELERATOR)


def serves_together(method: Method, inputs: Inputs) -> bool:
    """Whether sequences can share padded rows: nothing may depend on a sequence's length or place in the whole."""
    alike = isinstance(method, Exact) or (isinstance(method, Rule) and method.shift_invariant)
    return alike and inputs.rule is None and inputs.bias is None and inputs.key_mask is None


def sequences_together(lengths: Sequence[int], heads: int, most: int) -> list[list[int]]:
    """Numbers of the sequences that go together, the longest first: padding costs each group at most `most` scores,
    and, some thousand apart, no more tokens than it has."""
    groups: list[list[int]] = []
    longest = waste = tokens = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        more = (longest**2 - length**2) * heads
        if not groups or waste + more > most or (len(groups[-1]) + 1) * longest > 2 * (tokens + length) + FREE:
            groups.append([])
            longest, waste, tokens, more = length, 0, 0, 0
        waste, tokens = waste + more, tokens + length
        groups[-1].append(number)
    return groups


@dataclass(frozen=True)
class Laid:
    """Sequences in padded rows: inputs (S, H, longest, D), the output alike (S H, longest, Dv), and their places."""

    inputs: Inputs
    shortest: int
    output: Tensor | None
    places: Places


def laid_together(row: Inputs, spans: Sequence[tuple[int, int]], first_head: int, output: Tensor | None) -> Laid:
    """The sequences `spans` of one packed batch row, and the model's `output` (1, H, N, Dv) where there is one."""
    device = row.query.device
    starts, stops = torch.tensor(spans).T
    lengths = stops - starts
    longest = int(lengths.max())
    within = torch.arange(longest)
    # padding reads the sequence's own first token
    real = within < lengths.unsqueeze(1)
    tokens = starts.unsqueeze(1) + torch.where(real, within, 0)
    slots = real.flatten().nonzero().squeeze(1)
    firsts = starts.unsqueeze(1).expand_as(tokens).flatten()[slots]
    places = Places(
        len(spans), slice(first_head, first_head + row.heads), slots.to(device),
        tokens.flatten()[slots].to(device), firsts.to(device),
    )  # fmt: skip
    chosen = tokens.flatten().to(device)

    def laid(tensor: Tensor) -> Tensor:
        """(1, H, N, x) -> (S, H, longest, x)."""
        return tensor[0].index_select(1, chosen).unflatten(1, (len(spans), longest)).transpose(0, 1)

    mask = None if bool(real.all()) else real.to(device)
    # values are for the check of the output alone
    value = row.value if output is not None else row.value[..., :0]
    inputs = replace(
        row, query=laid(row.query), key=laid(row.key), value=laid(value), offset=0, cu_seqlens=None, boundaries=None,
        key_mask=mask, rule=None if mask is None else TensorMask(mask[:, None, :, None]),
    )  # fmt: skip
    return Laid(inputs, int(lengths.min()), None if output is None else laid(output).flatten(0, 1), places)
