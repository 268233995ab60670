"""Checks of independence: of padding, other rows, the future, packed neighbours, masked NaN, strides and repetition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor

from longlens.testing.claims import Request
from longlens.testing.report import CaseResult
from longlens.testing.subject import Subject, gradients, relative_error


def padding(subject: Subject, side: str) -> Iterator[CaseResult]:
    """Rows padded on `side` and masked give the same as without padding, whatever the padding contains.

    Both kinds of padding are needed: keys of ordinary size reveal a normaliser that forgets the mask, in which large
    keys may vanish, while only large keys change a maximum over all keys.
    """
    lengths, full = (64, 47), 80
    keep = torch.zeros(len(lengths), full, dtype=torch.bool)
    real = [slice(0, length) if side == "right" else slice(full - length, full) for length in lengths]
    for row, rows in enumerate(real):
        keep[row, rows] = True
    for (mode, causal), (size, factor) in product(subject.modes(masked=True), (("ordinary", 1.0), ("large", 30.0))):
        request = subject.draw(len(lengths), length=full, is_causal=causal)
        tensors = [torch.where(keep[:, None, :, None], tensor, factor * tensor) for tensor in request.tensors]
        request = replace(request.on(*tensors), key_mask=keep)
        output = subject(request)
        for row, rows in enumerate(real):
            case = f"{full - lengths[row]} {size} of {full}, {mode}"
            if side in subject.claims.padding_invariant:
                alone = subject(request.cut(slice(row, row + 1), rows))
                yield subject.same(f"{case}, against unpadded", output[row : row + 1, :, rows], alone)
            if subject.claims.kind == "pattern":
                yield subject.judge(f"{case}, against the definition", request.cut(slice(row, row + 1)), rows)


def padding_left(subject: Subject) -> Iterator[CaseResult]:
    """Padding before a sequence changes nothing."""
    return padding(subject, "left")


def padding_right(subject: Subject) -> Iterator[CaseResult]:
    """Padding after a sequence changes nothing."""
    return padding(subject, "right")


def batch(subject: Subject) -> Iterator[CaseResult]:
    """A row of a batch gives the same as alone, whatever the other rows contain."""
    for mode, causal in subject.modes():
        request = subject.draw(3, is_causal=causal)
        output = subject(request)
        for row in range(3):
            alone = subject(request.cut(slice(row, row + 1)))
            yield subject.same(f"row {row} alone, {mode}", output[row : row + 1], alone)
        factor = torch.tensor([1.0, 5.0, 5.0], dtype=request.query.dtype).view(3, 1, 1, 1)
        beside = subject(request.on(*(tensor * factor for tensor in request.tensors)))
        yield subject.same(f"other rows times 5, {mode}", beside[:1], output[:1])


def causality(subject: Subject) -> Iterator[CaseResult]:
    """No query depends on later tokens, and no gradient flows from it to them."""
    request = subject.draw(is_causal=True)
    output = subject(request)
    last = request.key.clone()
    last[:, :, -1] *= 6
    yield subject.same("last key times 6", subject(replace(request, key=last))[:, :, :-1], output[:, :, :-1])
    for cut in (1, 32, 63):
        other = subject.draw(is_causal=True, seed=7)
        mixed = [
            torch.cat([ours[:, :, :cut], 3 * theirs[:, :, cut:]], 2)
            for ours, theirs in zip(request.tensors, other.tensors, strict=True)
        ]
        moved = subject(request.on(*mixed))
        yield subject.same(f"everything from {cut} on replaced", moved[:, :, :cut], output[:, :, :cut])
    if subject.claims.gradients:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in request.tensors]
        out = subject(request.on(*leaves))[:, :, :32]
        flows = [gradient[:, :, 32:].abs().max() for gradient in torch.autograd.grad(out.square().sum(), leaves)]
        largest = float(torch.stack(flows).max())
        yield CaseResult("gradient of the first 32 rows to later ones", largest == 0.0, "0", f"{largest:.1e}")


def packing(subject: Subject) -> Iterator[CaseResult]:
    """Packed sequences give the same as each sequence alone."""
    bounds = (0, 40, 41, 64, 128)
    for mode, causal in subject.modes():
        request = replace(
            subject.draw(1, length=bounds[-1], is_causal=causal), cu_seqlens=torch.tensor(bounds, dtype=torch.int32)
        )
        output = subject(request)
        for start, stop in pairwise(bounds):
            apart = subject(request.cut(slice(None), slice(start, stop)))
            yield subject.same(f"tokens {start} to {stop}, {mode}", output[:, :, start:stop], apart)


def tensor_mask(subject: Subject) -> Iterator[CaseResult]:
    """A bool tensor, True = attend, of full size and broadcast."""
    generator = torch.Generator().manual_seed(11)
    for mode, causal in subject.modes(masked=True):
        for shape in ((2, 1, 64, 64), (1, 4, 64, 64), (64, 64)):
            mask = torch.rand(shape, generator=generator) < 0.5
            request = replace(subject.draw(is_causal=causal), attn_mask=mask | torch.eye(64, dtype=torch.bool))
            yield subject.judge(f"mask {shape}, {mode}", request)


def fully_masked(subject: Subject) -> Iterator[CaseResult]:
    """A row without keys has output 0, log-sum-exp -inf and gradient 0, and does not affect other rows."""
    for mode, causal in subject.modes(masked=True):
        request = subject.draw(is_causal=causal)
        if subject.claims.key_mask is not None:
            keep = torch.ones(2, 64, dtype=torch.bool)
            keep[1] = False
            yield from _zeros(subject, f"key mask, {mode}", replace(request, key_mask=keep))
            nothing = replace(request, key_mask=torch.zeros_like(keep))
            yield _is_zero(f"every key masked, {mode}, output", subject(nothing))
            if subject.claims.gradients:
                flows = torch.cat([gradient.flatten() for gradient in gradients(subject, nothing)])
                yield _is_zero(f"every key masked, {mode}, gradient", flows)
        if subject.claims.attn_mask:
            mask = torch.ones(2, 1, 64, 64, dtype=torch.bool)
            mask[1] = False
            yield from _zeros(subject, f"attn_mask, {mode}", replace(request, attn_mask=mask))
    if subject.claims.causal == "bottom-right" and subject.claims.cross_lengths:
        output = subject(subject.draw(length=64, keys=40, is_causal=True))[:, :, :24]
        yield _is_zero("causal, 24 queries before the first key", output)


def masked_nan(subject: Subject) -> Iterator[CaseResult]:
    """NaN and infinity in masked keys and values reach neither the output nor a gradient."""
    for poison in (torch.nan, torch.inf):
        for mode, causal in subject.modes():
            request = subject.draw(is_causal=causal)
            if subject.claims.key_mask is not None and (not causal or subject.claims.masks_with_causal):
                keep = torch.ones(2, 64, dtype=torch.bool)
                keep[:, 50:] = False
                masked = replace(request, key_mask=keep)
                yield from _unpoisoned(
                    subject, f"{poison} behind the key mask, {mode}", masked, slice(50, 64), slice(0, 64)
                )
            if causal:
                yield from _unpoisoned(subject, f"{poison} in the future", request, slice(63, 64), slice(0, 63))
            elif subject.claims.pattern is not None:
                blind = ~subject.claims.pattern.allowed(torch.arange(64).view(64, 1), torch.tensor([[20]]), 64)
                rows = blind.reshape(-1, 64).all(0).nonzero().squeeze(1)
                yield from _unpoisoned(subject, f"{poison} outside the pattern", request, slice(20, 21), rows)


def layouts(subject: Subject) -> Iterator[CaseResult]:
    """Strides make no difference: transposed, every second element, expanded."""
    for mode, causal in subject.modes():
        request = subject.draw(is_causal=causal)
        tensors = {
            "(B, N, H, D) transposed": [_restride(tensor, _transposed) for tensor in request.tensors],
            "every second element": [_restride(tensor, _spread) for tensor in request.tensors],
        }
        output = subject(request)
        for name, given in tensors.items():
            yield subject.same(f"{name}, {mode}", subject(request.on(*given)), output)
        one = [tensor[:, :1].expand_as(tensor) for tensor in request.tensors[1:]]
        whole = subject(request.on(request.query, *(tensor.contiguous() for tensor in one)))
        yield subject.same(f"heads expanded, {mode}", subject(request.on(request.query, *one)), whole)


def determinism(subject: Subject) -> Iterator[CaseResult]:
    """The same call twice gives the same bits, forward and backward, whatever the state of torch's generator."""
    for mode, causal in subject.modes():
        request = subject.draw(is_causal=causal)
        runs: dict[str, Callable[[], Sequence[Tensor]]] = {"output": partial(_alone, subject, request)}
        if subject.claims.gradients:
            runs["gradients"] = partial(gradients, subject, request)
        for name, run in runs.items():
            output = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                output.append(run())
            moved = max(relative_error(a, b) for a, b in zip(*output, strict=True))
            same = all(torch.equal(a, b) for a, b in zip(*output, strict=True))
            yield CaseResult(f"{name}, {mode}", same, "equal bits", f"a change of {moved:.1e}")


def _alone(subject: Subject, request: Request) -> tuple[Tensor]:
    return (subject(request),)


def _zeros(subject: Subject, case: str, request: Request) -> Iterator[CaseResult]:
    yield _is_zero(f"{case}, output", subject(request)[1:])
    alone = subject(request.cut(slice(0, 1)))
    yield subject.same(f"{case}, the row beside it", subject(request)[:1], alone)
    if subject.claims.lse is not None:
        lse = subject.with_lse(request)[1][1:]
        yield CaseResult(f"{case}, lse", bool((lse == -torch.inf).all()), "-inf", str(float(lse.flatten()[0])))
    if subject.claims.gradients:
        output = gradients(subject, request)
        yield _is_zero(f"{case}, gradient", torch.cat([gradient[1:].flatten() for gradient in output]))
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in output)
        yield CaseResult(f"{case}, gradient beside it", finite, "finite", "finite" if finite else "not finite")


def _is_zero(case: str, output: Tensor) -> CaseResult:
    largest = float(output.detach().abs().max())
    return CaseResult(case, largest == 0.0, "0", f"{largest:.1e}")


def _unpoisoned(
    subject: Subject, case: str, request: Request, bad: slice, rows: slice | Tensor
) -> Iterator[CaseResult]:
    """Outputs of rows that may not attend to the keys `bad`, which are zero in one call and not finite in the other."""
    clean, dirty = list(request.tensors), list(request.tensors)
    poison = torch.nan if "nan" in case else torch.inf
    for place in (1, 2):
        clean[place], dirty[place] = clean[place].clone(), dirty[place].clone()
        clean[place][:, :, bad], dirty[place][:, :, bad] = 0.0, poison
    expected, output = subject(request.on(*clean)), subject(request.on(*dirty))
    yield subject.same(case, output[:, :, rows], expected[:, :, rows])
    if subject.claims.gradients:
        leaves = [tensor.requires_grad_() for tensor in dirty]
        out = subject(request.on(*leaves))[:, :, rows]
        flows = torch.autograd.grad(out.sum(), leaves)
        good = all(bool(torch.isfinite(flow[:, :, rows]).all()) for flow in flows[:1])
        good &= all(bool(torch.isfinite(flow).all()) for flow in flows[1:])
        yield CaseResult(f"gradient, {case}", good, "finite", "finite" if good else "not finite")


def _transposed(shape: torch.Size, like: Tensor) -> Tensor:
    return like.new_empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


def _spread(shape: torch.Size, like: Tensor) -> Tensor:
    return like.new_empty(*shape[:2], 2 * shape[2], 2 * shape[3])[:, :, ::2, ::2]


def _restride(tensor: Tensor, make: Callable[[torch.Size, Tensor], Tensor]) -> Tensor:
    return make(tensor.shape, tensor).copy_(tensor)
