"""The walk over the attention matrix that feeds the collectors: tile by tile, nothing N x N.

For each tile of queries the scores s = scale q k^T (+ bias, masks) are made once. Where a tile holds every key of its
rows, their log-sum-exp follows at once, and statistics of rows and of columns come from one walk; a sparse method whose
rows are spread over several tiles is first asked for the log-sum-exp of its rows. Formulas: the modules
of `longlens.lens.collect`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from longlens.errors import LensError, UnsupportedError
from longlens.lens.block import FLOOR, LN2, Block, Extent, group_largest, take
from longlens.lens.collect.collector import Collector, by_name
from longlens.lens.results import Result
from longlens.ops.attention import resolve_method
from longlens.ops.biases import Bias
from longlens.ops.choose import refuse_unless_able
from longlens.ops.exact.blockwise import TileKernel
from longlens.ops.inputs import Inputs, check_inputs
from longlens.ops.masks import Rule
from longlens.ops.method import Method
from longlens.ops.registry import ENTRIES
from longlens.ops.tiles import Piece, Tile, TileShape, size

# scores held at a time, over heads: they and what is made of them stay in the second-level cache
ROWS = 64
SCORES = 2**20
# rows of a sequence on which the weights are checked against the module's own output
SAMPLES = 4
# relative error of an output that rounding explains, by dtype of the inputs
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


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
) -> dict[str, Result]:
    """Statistics of the attention weights that `longlens.attention` would use, in memory linear in the length.

    Args:
        query, key, attn_mask, is_causal, scale, method, key_mask, cu_seqlens, bias: as `longlens.attention` takes them;
            query and key after any rotation.
        collect: what to collect (`longlens.lens.collect.collector`); names must differ.
        value: (B, Hkv, Nk, Dv), and `output` (B, H, Nq, Dv), what the model's attention gave: where both are given,
            sampled rows are checked to sum to 1 and to give that output.
        softcap: scores become softcap tanh(s / softcap) before bias and masks (Gemma 2).
        sinks: (H,) logits of a key that holds no value and takes part of each row's mass (GPT-OSS).
        where: what messages call this attention ("layer 3").

    Returns:
        Result by the collector's name, float32 (float64 for float64 inputs). Packed sequences keep the numbering of the
        whole; distances count within a sequence.

    Raises:
        InputError and its kin: inputs that do not fit. UnsupportedError: the method has no weights. LensError: the
        weights do not sum to 1, or do not give `output`.
    """
    named = by_name(collect)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        inputs = check_inputs(
            query, key, key if value is None else value, attn_mask, 0.0, is_causal, scale, key_mask, cu_seqlens, bias,
            False,
        )  # fmt: skip
        chosen = resolve_method(method)
        refuse_unless_able(chosen, inputs)
        wide = torch.promote_types(query.dtype, torch.float32)
        extent = Extent(query.shape[0], query.shape[1], query.shape[2], key.shape[2], wide, query.device)
        states = {name: collector.start(extent) for name, collector in named.items()}
        check = None
        if value is not None and output is not None:
            check = _Check(where, output.detach().flatten(0, 1), TOLERANCE[query.dtype], sinks is not None)
        most = max((collector.largest for collector in collect), default=0)
        for part in _parts(chosen, inputs):
            for block in _blocks(part, softcap, sinks, most, wide):
                for state in states.values():
                    state.update(block)
                if check is not None:
                    check.update(block, part)
            if check is not None:
                check.finish()
        return {name: state.result() for name, state in states.items()}


@dataclass(frozen=True)
class _Part:
    """One packed sequence, or one or all batch rows: its place in the whole, its method and inputs."""

    method: Method
    inputs: Inputs
    first_lane: int
    first_row: int
    first_key: int


def _parts(method: Method, inputs: Inputs) -> Iterator[_Part]:
    if inputs.query.numel() == 0 or inputs.keys == 0:
        return
    if inputs.cu_seqlens is not None:
        for index, row in enumerate(inputs.rows()):
            assert row.cu_seqlens is not None
            for (start, _), sequence in zip(pairwise(row.cu_seqlens), row.sequences(), strict=True):
                if sequence.queries:
                    form, part = method.localise(sequence)[0]
                    yield _Part(form, part, index * inputs.heads, start, start)
        return
    lane = 0
    for form, part in method.localise(inputs):
        yield _Part(form, part, lane, 0, 0)
        lane += part.query.shape[0] * part.query.shape[1]


def _blocks(part: _Part, softcap: float | None, sinks: Tensor | None, most: int, wide: torch.dtype) -> Iterator[Block]:
    inputs = replace(part.inputs, softcap=softcap)
    if inputs.key_mask is not None:
        keep = inputs.key_mask[:, None, :, None]
        inputs = replace(inputs, key=inputs.key.masked_fill(~keep, 0.0))
    widened = replace(
        inputs, query=inputs.query.to(wide), key=inputs.key.to(wide), value=inputs.value[..., :0].to(wide)
    )
    # scores in bits: for nothing, unless something is added to them in between
    plain = softcap is None and inputs.bias is None
    in_bits = replace(widened, scale=widened.scale / LN2) if plain else widened
    rows = ROWS if inputs.device_type == "cpu" else 1024
    # whole rows: no tile is cut along its keys
    tiled = part.method.tiles(in_bits, TileShape(rows, 2**62, SCORES))
    if tiled is None:
        able = [entry.name for entry in ENTRIES if entry.exact != "no"]
        raise UnsupportedError(
            f"method '{part.method}' has no attention weights to look at: it never forms softmax(q k^T)\n"
            f"  methods that have: {', '.join(able)}"
        )
    q, k = tiled.inputs.query.flatten(0, 1), tiled.inputs.key.flatten(0, 1)
    lse: Tensor | None = None
    scratch = _Scratch()
    for tile in tiled.tiles:
        if not tile.once and lse is None:
            if softcap is not None or sinks is not None:
                raise UnsupportedError(
                    f"method '{part.method}' has no softcap and no sinks; use exact with a mask rule"
                )
            lse = part.method.attend(replace(widened, value=widened.key[..., :1], need_lse=True)).lse
            assert lse is not None
            lse = lse.flatten(0, 1)
        for piece in tile.pieces:
            for heads in _head_ranges(tiled.inputs, tile, piece, len(k)):
                kernel = TileKernel(tiled.inputs, q, k, heads, tile.rows, 0)
                scores = kernel.scores(piece) if plain else kernel.scores(piece).div_(LN2)
                yield _block(part, kernel, scores, tile, piece, lse, sinks, most, scratch)


def _head_ranges(inputs: Inputs, tile: Tile, piece: Piece, kv_heads: int) -> Iterator[slice]:
    per_head = inputs.groups * size(tile.rows) * size(piece.keys)
    step = max(1, min(kv_heads, SCORES // max(1, per_head)))
    for start in range(0, kv_heads, step):
        yield slice(start, min(start + step, kv_heads))


class _Scratch:
    """Memory for a temporary of a block's size, kept from one block to the next."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def like(self, name: str, tensor: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is None or held.numel() < tensor.numel():
            held = self._held[name] = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        return held[: tensor.numel()].view(tensor.shape)


def _block(
    part: _Part, kernel: TileKernel, scores: Tensor, tile: Tile, piece: Piece, lse: Tensor | None, sinks: Tensor | None,
    most: int, scratch: _Scratch,
) -> Block:  # fmt: skip
    inputs = kernel.inputs
    masked = bool(piece.edges) or inputs.bias is not None
    largest = group_largest(scores) if most else None
    lanes = slice(kernel.heads.start + part.first_lane, kernel.heads.stop + part.first_lane)
    if tile.once:
        ground = (scores if largest is None else largest).amax(-1, keepdim=True)
        logits = None
        if sinks is not None:
            heads = torch.arange(lanes.start, lanes.stop, device=scores.device) % inputs.heads
            logits = sinks.to(scores)[heads].view(-1, 1, 1) / LN2
            ground = torch.maximum(ground, logits)
    else:
        assert lse is not None
        index = (
            tile.rows if isinstance(tile.rows, slice) or tile.rows.ndim == 1 else tile.rows.flatten(0, 1)[kernel.heads]
        )
        ground = take(lse, kernel.heads, index).unsqueeze(-1).to(scores.dtype) / LN2
    # a row that may attend to nothing: subtract 0
    ground = ground.masked_fill(ground == -torch.inf, 0.0)
    exponents = scores.sub_(ground)
    if largest is not None:
        largest = largest.sub_(ground)
    if masked:
        exponents.clamp_(min=FLOOR)
    e = torch.exp2(exponents, out=scratch.like("e", exponents))
    if tile.once:
        total = e.sum(-1, keepdim=True)
        whole = total if logits is None else total + (logits - ground).exp2_()
        log_total = whole.log2()
        row_lse = (ground + log_total).squeeze(-1) * LN2
        inverse = whole.reciprocal()
        dead = total == 0
        if masked and bool(dead.any()):
            inverse, log_total = inverse.masked_fill(dead, 0.0), log_total.masked_fill(dead, 0.0)
            row_lse = row_lse.masked_fill(dead.squeeze(-1), -torch.inf)
    else:
        total = e.sum(-1, keepdim=True)
        inverse, log_total = torch.ones_like(total), torch.zeros_like(total)
        row_lse = take(lse, kernel.heads, index).to(e.dtype)  # type: ignore[arg-type]
    flat = [i if isinstance(i, slice) or i.ndim < 3 else i.flatten(0, 1)[kernel.heads] for i in (tile.rows, piece.keys)]
    block = Block(
        lanes, flat[0], flat[1], exponents, e, inverse, log_total, row_lse, part.first_row, part.first_key,
        inputs.offset, tile.once, masked, largest, most,
    )  # fmt: skip
    block.__dict__["total"] = total
    return block


class _Check:
    """The weights of sampled rows must sum to 1 and, times the values, give the module's own output."""

    def __init__(self, where: str, output: Tensor, tolerance: float, sinks: bool) -> None:
        self.where, self.output, self.tolerance, self.sinks = where, output, tolerance, sinks
        self._sums: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def update(self, block: Block, part: _Part) -> None:
        """Take in a block; looks at a few rows of it, in blocks that hold one of the part's sampled queries."""
        inputs = part.inputs
        if not isinstance(block.rows, slice):
            return
        wanted = {round(place * (inputs.queries - 1) / max(1, SAMPLES - 1)) for place in range(SAMPLES)}
        first, last, step = block.rows.start, block.rows.stop, block.rows.step or 1
        for row in sorted(wanted):
            if not (first <= row < last and (row - first) % step == 0):
                continue
            weights = block.e[:, (row - first) // step] * block.inverse[:, (row - first) // step]
            lanes = torch.arange(block.lanes.start, block.lanes.stop, device=weights.device) - part.first_lane
            values = inputs.value.flatten(0, 1)[lanes // inputs.groups]
            held = take(values, slice(0, len(values)), block.keys)
            # a masked value may be anything: it must not count
            held = held.to(weights.dtype).masked_fill((weights == 0).unsqueeze(-1), 0.0)
            mixed = torch.bmm(weights.unsqueeze(1), held).squeeze(1)
            there = self.output[block.lanes, row + part.first_row].to(weights.dtype)
            key = row * 2**32 + block.lanes.start
            mass, sums, _ = self._sums.get(key, (torch.zeros_like(weights[:, 0]), torch.zeros_like(mixed), there))
            self._sums[key] = (mass + weights.sum(-1), sums + mixed, there)

    def finish(self) -> None:
        """Raise `LensError` unless all sampled rows of the part fit."""
        for key, (mass, mixed, there) in self._sums.items():
            row = key // 2**32
            # a sink keeps some of the mass; a row that may attend to nothing has none
            over = (mass - 1.0).clamp(min=0) if self.sinks else (mass - 1.0).abs().masked_fill(mass == 0, 0.0)
            worst = float(over.max())
            size_of = max(float(there.norm()), float(mixed.norm()), 1e-30)
            error = float((mixed - there).norm()) / size_of
            if worst > 1e-3 or not error <= self.tolerance:
                raise LensError(
                    f"{self.where}: expected the weights that the lens rebuilt to give the model's own output, got a "
                    f"relative difference of {error:.2g} at query {row} (rounding explains {self.tolerance:.0e}) and a "
                    f"sum of weights off by {worst:.2g}; scale, mask, positions or heads differ from the model's"
                )
        self._sums.clear()
