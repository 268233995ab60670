"""Writers that take a contact map's rows: selected pairs, strongest partners, the whole map, a preview."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longlens.errors import InputError
from longlens.io.formats import require_zarr
from longlens.io.pairs import PairSpool
from longlens.lens.contacts import Rows
from longlens.report.contacts import CELLS

FORMATS = ("parquet", "npz", "rr", "zarr")
CHUNK = 256


@dataclass(frozen=True)
class ContactOptions:
    """The part of a map that is written: pairs above `threshold`, the `top` partners of each residue, or a `band`
    |i - j| <= band (one of the three), from `separation` on; or, with the format zarr, the map in `array_dtype`."""

    format: str = "parquet"
    threshold: float | None = None
    top: int | None = None
    band: int | None = None
    separation: int = 6
    array_dtype: str = "float16"
    figure: bool = False

    def __post_init__(self) -> None:
        chosen = [name for name in ("threshold", "top", "band") if getattr(self, name) is not None]
        if self.format not in FORMATS or self.array_dtype not in ("float16", "float32"):
            raise InputError(f"expected a format of {', '.join(FORMATS)} and float16 or float32, got {self}")
        if self.format == "zarr" and chosen:
            raise InputError(f"expected format parquet, npz or rr with {chosen[0]}: zarr holds the whole map")
        if self.format == "zarr":
            require_zarr()
        if self.format != "zarr" and len(chosen) != 1:
            raise InputError(f"expected one of threshold, top and band, got {', '.join(chosen) or 'none'}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"expected a threshold in 0..1, got {self.threshold}")
        for name, least in (("top", 1), ("band", 0), ("separation", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"expected {name} of at least {least}, got {value}")
        if self.band is not None and self.band < self.separation:
            raise InputError(
                f"expected a band of at least the separation, {self.separation}, got {self.band}: no pair would be "
                "written"
            )


class MapWriter(ABC):
    """Takes the rows of one map's upper triangle, some rows at a time, in order."""

    @abstractmethod
    def take(self, rows: Rows) -> None:
        """Take the next rows."""


class PairWriter(MapWriter):
    """Pairs i < j that are far enough apart and above a threshold or within a band, by i and then j."""

    def __init__(self, options: ContactOptions, spool: PairSpool) -> None:
        self.options, self.spool = options, spool

    def take(self, rows: Rows) -> None:
        values, options = rows.probabilities, self.options
        if options.band is not None:
            values = values[:, : len(values) + options.band]
        gap = _gaps(values)
        keep = gap >= max(1, options.separation)
        keep &= values >= options.threshold if options.threshold is not None else gap <= (options.band or 0)
        i, j = keep.nonzero(as_tuple=True)
        values = values[i, j]
        self.spool.append(*(part.cpu().numpy() for part in (i + rows.first, j + rows.first, values)))


class TopPartnersWriter(MapWriter):
    """The `top` strongest partners of each residue, on either side."""

    def __init__(self, options: ContactOptions, residues: int) -> None:
        assert options.top is not None
        self.separation = max(1, options.separation)
        top = min(options.top, residues)
        self.values = torch.full((residues, top), -1.0)
        self.partners = torch.full((residues, top), -1, dtype=torch.int64)

    def take(self, rows: Rows) -> None:
        probabilities = rows.probabilities.masked_fill(_gaps(rows.probabilities) < self.separation, -1.0).cpu()
        self._merge(slice(rows.first, rows.first + len(probabilities)), probabilities, rows.first)
        self._merge(slice(rows.first, rows.first + probabilities.shape[1]), probabilities.T, rows.first)

    def _merge(self, owners: slice, probabilities: Tensor, first: int) -> None:
        """Take in `probabilities` (owners, m) of each owner with the partners first..first + m."""
        best, place = torch.topk(probabilities, min(self.values.shape[1], probabilities.shape[1]))
        values = torch.cat([self.values[owners], best], 1)
        partners = torch.cat([self.partners[owners], place + first], 1)
        self.values[owners], order = torch.topk(values, self.values.shape[1])
        self.partners[owners] = partners.gather(1, order)

    def finish(self, spool: PairSpool) -> None:
        """Each residue's partners, the strongest first."""
        i, rank = (self.values >= 0).nonzero(as_tuple=True)
        spool.append(i.numpy(), self.partners[i, rank].numpy(), self.values[i, rank].numpy())


class WholeMapWriter(MapWriter):
    """The whole map as a Zarr array."""

    def __init__(self, path: Path, residues: int, dtype: str, about: dict[str, Any]) -> None:
        import zarr

        chunk = min(CHUNK, residues)
        self.array: Any = zarr.create_array(
            path, shape=(residues, residues), dtype=dtype, chunks=(chunk, chunk), attributes=about
        )

    def take(self, rows: Rows) -> None:
        values = rows.probabilities.cpu().numpy().astype(self.array.dtype)
        last = rows.first + len(values)
        self.array[rows.first : last, rows.first :] = values
        self.array[last:, rows.first : last] = values[:, len(values) :].T


class MapPreview(MapWriter):
    """The map in at most `CELLS` x `CELLS` cells, each the largest of its pairs at least `separation` apart: nearer
    ones, on which no head was fitted, would outshine all others in a long protein."""

    def __init__(self, residues: int, separation: int) -> None:
        self.separation = separation
        self.width = -(-residues // CELLS)
        count = -(-residues // self.width)
        self.cells = torch.zeros(count, count)

    def take(self, rows: Rows) -> None:
        probabilities = rows.probabilities.cpu()
        probabilities = probabilities.masked_fill(_gaps(probabilities) < self.separation, 0.0)
        columns = torch.arange(rows.first, rows.first + probabilities.shape[1]) // self.width
        owners = torch.arange(rows.first, rows.first + len(probabilities)) // self.width
        by_column = torch.zeros(len(probabilities), len(self.cells))
        by_column.scatter_reduce_(1, columns.expand_as(probabilities), probabilities, "amax")
        self.cells.scatter_reduce_(0, owners.unsqueeze(1).expand_as(by_column), by_column, "amax")

    def finish(self) -> Tensor:
        """Both halves."""
        return torch.maximum(self.cells, self.cells.T)


def _gaps(probabilities: Tensor) -> Tensor:
    """j - i of some rows of the upper triangle."""
    m, n = probabilities.shape
    return torch.arange(n, device=probabilities.device) - torch.arange(m, device=probabilities.device).unsqueeze(1)
