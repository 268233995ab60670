"""The scan: computes the attention matrix tile by tile for the collectors, and holds nothing of size N x N.

For each tile of queries the scores s = scale q k^T (+ bias, masks) are made once. Where a tile holds every key of its
rows, their log-sum-exp follows at once, and statistics of rows and of columns come from one pass; a sparse method whose
rows are spread over several tiles is run first, for the log-sum-exp of its rows. Scores are those of
`longlens.ops.tiles.kernel`; the formulas of the statistics are in the modules of `longlens.lens.collect`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longlens.errors import UnsupportedError
from longlens.lens.block import FLOOR, LN2, Block, Extent, Places, group_largest
from longlens.lens.collect.collector import Collector, State, by_name
from longlens.lens.output_check import OutputCheck
from longlens.lens.padded import ScanShape, laid_together, scan_shape, sequences_together, serves_together
from longlens.lens.statistic import Statistic
from longlens.ops.biases import Bias
from longlens.ops.choose import refuse_unless_able
from longlens.ops.inputs import Inputs, check_inputs, wide_dtype
from longlens.ops.masks import Rule
from longlens.ops.method import Method
from longlens.ops.registry import METHOD_INFOS, resolve_method
from longlens.ops.tiles.forward import sinks_by_head
from longlens.ops.tiles.grid import Piece, Tile, TileShape
from longlens.ops.tiles.index import take
from longlens.ops.tiles.kernel import TileKernel, head_groups
from longlens.ops.tiles.scratch import Scratch


def scan(
    query: Tensor,
    key: Tensor,
    *,
    collect: Sequence[Collector],
    value: Tensor | None = None,
    output: Tensor | None = None,
    attn_mask: Rule | Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    method: Method | str = "exact",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Bias | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    where: str = "this attention",
) -> dict[str, Statistic]:
    """Statistics of the attention weights that `longlens.attention` would use, in memory linear in the length.

    Args:
        query, key, attn_mask, is_causal, scale, method, key_mask, cu_seqlens, bias: as `longlens.attention` takes them;
            query and key after any rotation.
        collect: what to collect (`longlens.lens.collect.collector`); names must differ.
        value: (B, Hkv, Nk, Dv), and `output` (B, H, Nq, Dv), what the model's attention gave: where both are given,
            sampled rows are checked to sum to 1 and to give that output.
        softcap, sinks: as `longlens.attention` takes them; a sink takes part of each row's mass, so that the weights
            of the keys sum to less than 1.
        where: what messages call this attention ("layer 3").

    Returns:
        Statistics by the collectors' names, float32 (float64 for float64 inputs). Packed sequences keep the numbering
        of the whole; distances count within a sequence.

    Raises:
        InputError and its kin: inputs that do not fit. UnsupportedError: the method has no weights. LensError: the
        weights do not sum to 1, or do not give `output`.
    """
    named = by_name(collect)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        inputs = check_inputs(
            query, key, key if value is None else value, attn_mask, 0.0, is_causal, scale, key_mask, cu_seqlens, bias,
            False, softcap, sinks,
        )  # fmt: skip
        chosen = resolve_method(method)
        refuse_unless_able(chosen, inputs)
        extent = Extent(
            query.shape[0], query.shape[1], query.shape[2], key.shape[2], wide_dtype(query.dtype), query.device
        )  # fmt: skip
        states = {name: collector.start(extent) for name, collector in named.items()}
        check = None
        if value is not None and output is not None:
            check = OutputCheck(where, query.dtype, sinks is not None)
        shape = scan_shape(inputs.device_type)
        together = all(state.together for state in states.values())
        for part in _parts(chosen, inputs, shape, together, None if output is None else output.detach()):
            _scan_part(part, named, states, check, extent, shape)
        if check is not None:
            check.judge()
        return {name: state.result() for name, state in states.items()}


def _scan_part(
    part: _Part, named: dict[str, Collector], states: dict[str, State[Any]], check: OutputCheck | None, extent: Extent,
    shape: ScanShape,
) -> None:  # fmt: skip
    """Give the blocks of a part to the states, and to the check of the output."""
    own = states
    if part.places is not None:
        batch, heads, length, _ = part.inputs.query.shape
        laid = Extent(batch, heads, length, length, extent.dtype, extent.device)
        own = {name: collector.start(laid) for name, collector in named.items()}
    most = max((collector.largest for collector in named.values()), default=0)
    for block in _blocks(part, most, extent.dtype, shape):
        for state in own.values():
            state.update(block)
        if check is not None and part.output is not None:
            check.update(block, part.inputs, part.output, part.first_head, part.queries)
    if part.places is not None:
        for name, state in states.items():
            state.absorb(own[name], part.places)
    if check is not None:
        check.finish()


@dataclass(frozen=True)
class _Part:
    """One packed sequence, or one or all batch rows: its place in the whole, its method and inputs.

    `places`: it is several sequences, in padded rows, of which the shortest has `queries` tokens. `output` (heads,
    rows, Dv) is what the model's attention gave for it.
    """

    method: Method
    inputs: Inputs
    first_head: int
    first_row: int
    first_key: int
    queries: int
    output: Tensor | None = None
    places: Places | None = None


def _parts(method: Method, inputs: Inputs, shape: ScanShape, together: bool, output: Tensor | None) -> Iterator[_Part]:
    if inputs.query.numel() == 0 or inputs.keys == 0:
        return
    if inputs.cu_seqlens is not None:
        for index, row in enumerate(inputs.rows()):
            own = None if output is None else output[index : index + 1]
            yield from _sequences(method, row, index * inputs.heads, shape, together, own)
        return
    first, flat = 0, None if output is None else output.flatten(0, 1)
    for form, part in method.localise(inputs):
        heads = part.query.shape[0] * part.query.shape[1]
        yield _Part(form, part, first, 0, 0, part.queries, None if flat is None else flat[first : first + heads])
        first += heads


def _sequences(
    method: Method, row: Inputs, first_head: int, shape: ScanShape, together: bool, output: Tensor | None
) -> Iterator[_Part]:
    """The packed sequences of a batch row: those of like length together where they can be, in padded rows."""
    assert row.cu_seqlens is not None
    spans = [span for span in pairwise(row.cu_seqlens) if span[0] < span[1]]
    alone = set(range(len(spans)))
    if shape.together and together and serves_together(method, row):
        for group in sequences_together([stop - start for start, stop in spans], row.heads, shape.scores):
            if len(group) > 1:
                alone -= set(group)
                laid = laid_together(row, [spans[number] for number in group], first_head, output)
                form, part = method.localise(laid.inputs)[0]
                yield _Part(form, part, 0, 0, 0, laid.shortest, laid.output, laid.places)
    if not alone:
        return
    numbers = iter(range(len(spans)))
    for (start, stop), sequence in zip(pairwise(row.cu_seqlens), row.sequences(), strict=True):
        if start < stop and next(numbers) in alone:
            form, part = method.localise(sequence)[0]
            own = None if output is None else output[0, :, start:stop]
            yield _Part(form, part, first_head, start, start, stop - start, own)


def _blocks(part: _Part, most: int, wide: torch.dtype, shape: ScanShape) -> Iterator[Block]:
    inputs = part.inputs
    if inputs.key_mask is not None:
        keep = inputs.key_mask[:, None, :, None]
        inputs = replace(inputs, key=inputs.key.masked_fill(~keep, 0.0))
    widened = replace(
        inputs, query=inputs.query.to(wide), key=inputs.key.to(wide), value=inputs.value[..., :0].to(wide)
    )
    # scores in bits: free as part of the scale, unless a cap or a bias comes in between
    plain = inputs.softcap is None and inputs.bias is None
    in_bits = replace(widened, scale=widened.scale / LN2) if plain else widened
    # whole rows: no tile is cut along its keys
    tiled = part.method.tiles(in_bits, TileShape(shape.rows, 2**62, shape.scores))
    if tiled is None:
        able = [entry.name for entry in METHOD_INFOS if entry.exact != "no"]
        raise UnsupportedError(
            f"method '{part.method}' has no attention weights to look at: it never forms softmax(q k^T)\n"
            f"  methods that have: {', '.join(able)}"
        )
    q, k = tiled.inputs.query.flatten(0, 1), tiled.inputs.key.flatten(0, 1)
    make = _BlockMaker(part, most, sinks_by_head(inputs.sinks, widened.query), Scratch(q.device))
    for tile in tiled.tiles:
        if not tile.once and make.lse is None:
            lse = part.method.attend(replace(widened, value=widened.key[..., :1], need_lse=True)).lse
            assert lse is not None
            make.lse = lse.flatten(0, 1)
        for heads in head_groups(tiled.inputs, tile, len(k), shape.scores):
            kernel = TileKernel(tiled.inputs, q, k, heads, tile.rows, make.scratch)
            for piece in tile.pieces:
                scores = kernel.scores(piece)
                yield make.block(kernel, scores if plain else scores.div_(LN2), tile, piece)


@dataclass
class _BlockMaker:
    """Makes the blocks of a part from scores in bits. `sinks` (B H,) are logits; `lse` (B H, Nq) is that of rows whose
    keys are in several tiles, sinks included."""

    part: _Part
    most: int
    sinks: Tensor | None
    scratch: Scratch
    lse: Tensor | None = None

    def block(self, kernel: TileKernel, scores: Tensor, tile: Tile, piece: Piece) -> Block:
        """One block; the memory of `scores` becomes its exponents'."""
        part, heads = self.part, kernel.heads
        masked = bool(piece.edges) or kernel.inputs.bias is not None
        largest = group_largest(scores) if self.most else None
        # of a row whose keys are all here: its sink, and a number near its largest score; else its log-sum-exp
        sinks = lse = None
        if tile.once:
            ground = (scores if largest is None else largest).amax(-1, keepdim=True)
            if self.sinks is not None:
                sinks = self.sinks[heads].view(-1, 1, 1) / LN2
                ground = torch.maximum(ground, sinks)
        else:
            assert self.lse is not None
            lse = take(self.lse, heads, kernel.rows).to(scores.dtype)
            ground = lse.unsqueeze(-1) / LN2
        # a row that may attend to nothing: subtract 0
        ground = ground.masked_fill(ground == -torch.inf, 0.0)
        exponents = scores.sub_(ground)
        if largest is not None:
            largest = largest.sub_(ground)
        if masked:
            exponents.clamp_(min=FLOOR)
        e = torch.exp2(exponents, out=self.scratch.empty("e", exponents.shape, exponents.dtype))
        total = e.sum(-1, keepdim=True)
        if lse is None:
            inverse, log_total, lse = _normalisers(total, ground, sinks)
        else:
            inverse, log_total = torch.ones_like(total), torch.zeros_like(total)
        block = Block(
            slice(heads.start + part.first_head, heads.stop + part.first_head), kernel.rows, kernel.keys(piece),
            exponents, e, inverse, log_total, lse, part.first_row, part.first_key, kernel.inputs.offset, tile.once,
            masked, largest, self.most,
        )  # fmt: skip
        block.__dict__["total"] = total
        return block


def _normalisers(total: Tensor, ground: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """1 / the sum of a row's exponentials, its logarithm in bits (both (heads, rows, 1), 0 for a row without keys), and
    the log-sum-exp (heads, rows), sinks included."""
    whole = total if sinks is None else total + (sinks - ground).exp2_()
    log_total = whole.log2()
    lse = (ground + log_total).squeeze(-1) * LN2
    inverse, dead = whole.reciprocal(), total == 0
    # reading the answer back would stall an accelerator
    if dead.device.type != "cpu" or bool(dead.any()):
        inverse, log_total = inverse.masked_fill(dead, 0.0), log_total.masked_fill(dead, 0.0)
        lse = lse.masked_fill(dead.squeeze(-1), -torch.inf)
    return inverse, log_total, lse
