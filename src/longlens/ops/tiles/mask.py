"""Which pairs inside a tile may attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longlens.ops.inputs import Inputs
from longlens.ops.masks import Rule
from longlens.ops.tiles.grid import Edge, Interval
from longlens.ops.tiles.index import Index, part, positions, size

# pairs in masks kept for the tiles to come
SHARED_PAIRS = 2**18


@dataclass
class TileMask:
    """The pairs of a piece that may attend: those that all `rules` allow, none of `earlier` allows, and `key_mask`
    keeps.

    `earlier` holds the parts of a union that other tiles have covered, so that no pair counts twice.
    """

    inputs: Inputs
    rules: Sequence[Rule] = ()
    earlier: Sequence[Rule] = ()
    _shared: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def edges(self, rows: Index, keys: Index) -> tuple[Edge, ...]:
        """The edges of a piece."""
        count = size(keys)
        if not self.rules and not self.earlier:
            keep = self._key_mask(keys)
            return () if keep is None else (Edge(0, count, keep),)
        clear = self._clear(rows, keys)
        spans = [(0, count)] if clear is None else [(0, clear[0]), (clear[1], count)]
        return tuple(Edge(a, b, self._keep(rows, part(keys, a, b))) for a, b in spans if a < b)

    def _clear(self, rows: Index, keys: Index) -> Interval | None:
        """Columns of the piece in which every pair attends, where they are one range worth splitting off."""
        if self.earlier or not isinstance(rows, slice) or not isinstance(keys, slice):
            return None
        if (rows.step or 1) != 1 or (keys.step or 1) != 1 or self._key_mask(keys) is not None:
            return None
        lo, hi = rows.start + self.inputs.offset, rows.stop + self.inputs.offset
        clears = [rule.clear(lo, hi, self.inputs.keys) for rule in self.rules]
        a = max(keys.start, *(a for a, _ in clears)) - keys.start
        b = min(keys.stop, *(b for _, b in clears)) - keys.start
        return (a, b) if a < b else None

    def _keep(self, rows: Index, keys: Index) -> Tensor:
        shareable = (
            self.inputs.key_mask is None
            and isinstance(rows, slice)
            and isinstance(keys, slice)
            and all(rule.shift_invariant for rule in (*self.rules, *self.earlier))
        )
        if not shareable:
            return self._evaluate(rows, keys)
        assert isinstance(rows, slice)
        assert isinstance(keys, slice)
        shape = (keys.start - rows.start, size(rows), size(keys), rows.step or 1, keys.step or 1)
        if shape not in self._shared:
            # tiles far apart in a long row share nothing, and their masks must not pile up
            if sum(mask.numel() for mask in self._shared.values()) > SHARED_PAIRS:
                self._shared.clear()
            self._shared[shape] = self._evaluate(rows, keys)
        return self._shared[shape]

    def _evaluate(self, rows: Index, keys: Index) -> Tensor:
        device, n = self.inputs.key.device, self.inputs.keys
        q = positions(rows, self.inputs.offset, device).unsqueeze(-1)
        k = positions(keys, 0, device).unsqueeze(-2)
        keep = torch.ones((), dtype=torch.bool, device=device)
        for rule in self.rules:
            keep = keep & rule.allowed(q, k, n)
        for rule in self.earlier:
            keep = keep & ~rule.allowed(q, k, n)
        masked = self._key_mask(keys)
        keep = keep if masked is None else keep & masked
        return keep.expand(*(1,) * (2 - keep.ndim), *keep.shape) if keep.ndim < 2 else keep

    def _key_mask(self, keys: Index) -> Tensor | None:
        """(B, H|1, 1, keys) or None where every key is kept."""
        mask = self.inputs.key_mask
        if mask is None:
            return None
        if isinstance(keys, Tensor) and keys.ndim == 3:
            kept = mask.unsqueeze(1).expand(-1, keys.shape[1], -1).gather(2, keys).unsqueeze(2)
        else:
            kept = mask[:, keys][:, None, None, :]
        # reading the answer back would stall an accelerator, and there an extra mask costs little
        return None if kept.device.type == "cpu" and bool(kept.all()) else kept
