"""Checks of results: values, dtypes, gradients, the log-sum-exp, dropout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from longlens.testing.claims import Request
from longlens.testing.report import CaseResult, within
from longlens.testing.subject import Subject, gradients, relative_error, stacked_gradients

DROPOUT_ROWS = 200
STEP = 1e-5  # of central differences in float64: their own error is then near 1e-10


def agreement(subject: Subject) -> Iterator[CaseResult]:
    """The output equals the definition."""
    for mode, causal in subject.modes():
        yield subject.judge(mode, subject.draw(is_causal=causal, length=96))
        if subject.claims.kind != "approximate":
            # up to 1,000: an exponential without the row's maximum taken off overflows, in float64 too
            large = subject.draw(is_causal=causal, seed=1)
            yield subject.judge(f"{mode}, scores up to 1,000", replace(large, query=large.query * 256))


def odd_lengths(subject: Subject) -> Iterator[CaseResult]:
    """Lengths that are not multiples of a block, and a single token."""
    for length in subject.claims.lengths:
        for mode, causal in subject.modes():
            yield _judge_or_finite(subject, f"N={length}, {mode}", subject.draw(1, 2, length, is_causal=causal))


def cross_lengths(subject: Subject) -> Iterator[CaseResult]:
    """More keys than queries, fewer, and one query."""
    for queries, keys in ((5, 64), (64, 5), (1, 64), (70, 64)):
        for mode, causal in subject.modes():
            request = subject.draw(length=queries, keys=keys, is_causal=causal)
            yield _judge_or_finite(subject, f"Nq={queries}, Nk={keys}, {mode}", request)


def value_width(subject: Subject) -> Iterator[CaseResult]:
    """The output is linear in the value, column by column, whatever its width."""
    for mode, causal in subject.modes():
        request = subject.draw(value_width=40, is_causal=causal)
        full = subject(subject.draw(value_width=16, is_causal=causal).on(*request.tensors[:2], request.value[..., :16]))
        for width in (5, 40):
            output = subject(replace(request, value=request.value[..., :width].contiguous()))
            both = min(width, 16)
            yield subject.same(f"Dv={width}, {mode}", output[..., :both], full[..., :both])


def grouped(subject: Subject) -> Iterator[CaseResult]:
    """Fewer key/value heads serve groups of adjacent query heads, as if they were repeated."""
    for mode, causal in subject.modes():
        for key_heads in (2, 1):
            request = subject.draw(key_heads=key_heads, is_causal=causal)
            again = [tensor.repeat_interleave(4 // key_heads, 1) for tensor in request.tensors[1:]]
            output = subject(request)
            yield subject.same(f"Hkv={key_heads} of 4, {mode}", output, subject(request.on(request.query, *again)))


def scale(subject: Subject) -> Iterator[CaseResult]:
    """The scores are multiplied by the given scale."""
    for mode, causal in subject.modes():
        request = subject.draw(is_causal=causal)
        usual = subject(request)
        explicit = subject(replace(request, scale=request.query.shape[3] ** -0.5))
        yield subject.same(f"scale=D**-0.5 is the default, {mode}", explicit, usual)
        for scale in (1.0, 0.05):
            other = replace(request, scale=scale)
            if subject.claims.defined:
                yield subject.judge(f"scale={scale}, {mode}", other)
            else:
                moved = relative_error(subject(other), usual)
                yield CaseResult(f"scale={scale}, {mode}", moved > 1e-3, "a change of at least 1e-3", f"{moved:.1e}")


def dtypes(subject: Subject) -> Iterator[CaseResult]:
    """In each dtype: at most twice the error of a plain implementation in it, both against float64."""
    for name in subject.claims.dtypes:
        dtype = getattr(torch, name)
        for mode, causal in subject.modes():
            request = subject.draw(1, 2, 320, 32, dtype=dtype, is_causal=causal)
            if subject.claims.defined:
                yield subject.judge(f"{name}, {mode}", request)
                continue
            wide = subject(request.cast(subject.claims.sharpest))
            yield within(f"{name}, {mode}", relative_error(subject(request), wide), math.sqrt(torch.finfo(dtype).eps))


def gradient_values(subject: Subject) -> Iterator[CaseResult]:
    """Gradients of query, key and value equal those of the definition and the slope of the function itself."""
    for mode, causal in subject.modes():
        request = subject.draw(is_causal=causal)
        if subject.claims.defined:
            for name in subject.claims.dtypes:
                yield _judge_gradients(subject, f"{name}, {mode}", request.cast(getattr(torch, name)))
        if subject.claims.kind == "approximate" and "float64" in subject.claims.dtypes:
            yield _slope(subject, f"slope, {mode}", request.cast(torch.float64))
        elif not subject.claims.defined:
            output = torch.cat([gradient.flatten() for gradient in gradients(subject, request)])
            finite = bool(torch.isfinite(output).all())
            yield CaseResult(f"finite, {mode}", finite, "finite gradients", "finite" if finite else "not finite")


def second_derivatives(subject: Subject) -> Iterator[CaseResult]:
    """The second derivative, by torch.autograd.gradgradcheck in float64."""
    for mode, causal in subject.modes():
        request = subject.draw(1, 2, 6, 3, dtype=torch.float64, is_causal=causal)
        leaves = [tensor.requires_grad_() for tensor in request.tensors]

        def run(*tensors: Tensor, request: Request = request) -> Tensor:
            return subject(request.on(*tensors))

        ok = torch.autograd.gradgradcheck(run, leaves, raise_exception=False, fast_mode=True)
        yield CaseResult(mode, ok, "gradgradcheck passes", "passes" if ok else "fails")


def log_sum_exp(subject: Subject) -> Iterator[CaseResult]:
    """The log-sum-exp is natural, float32 or wider, of scaled and masked scores; the output does not change."""
    limit = 8 * torch.finfo(torch.float32).eps
    for mode, causal in subject.modes():
        for size in (1.0, 20.0):
            request = subject.draw(is_causal=causal, seed=2)
            request = replace(request, query=request.query * size)
            output, lse = subject.with_lse(request)
            yield subject.same(f"output, {mode}, queries times {size:.0f}", output, subject(request))
            if subject.claims.kind != "approximate":
                error = relative_error(lse, subject.expected_lse(request))
                yield within(f"lse, {mode}, queries times {size:.0f}", error, limit)


def softcap(subject: Subject) -> Iterator[CaseResult]:
    """Scores are capped before the masks, in the output and in every gradient."""
    for mode, causal in subject.modes():
        request = subject.draw(is_causal=causal, seed=4)
        # scores up to 20 and a cap of 3: most of them where the cap bends strongly
        yield from _judge_both(subject, mode, replace(request, query=request.query * 5, softcap=3.0))


def sinks(subject: Subject) -> Iterator[CaseResult]:
    """Sinks take part in the normalisation, in the output, the log-sum-exp and every gradient."""
    for mode, causal in subject.modes():
        request = subject.draw(is_causal=causal, seed=5)
        logits = torch.linspace(-2.0, 6.0, request.query.shape[1], dtype=request.query.dtype)
        request = replace(request, sinks=logits)
        yield from _judge_both(subject, mode, request)
        if subject.claims.lse is not None and subject.claims.kind != "approximate":
            error = relative_error(subject.with_lse(request)[1], subject.expected_lse(request))
            yield within(f"lse, {mode}", error, 8 * torch.finfo(torch.float32).eps)


def _judge_both(subject: Subject, mode: str, request: Request) -> Iterator[CaseResult]:
    """Output and gradients, alone and combined with the other claims."""
    variants = {mode: request}
    if subject.claims.key_mask is not None and (not request.is_causal or subject.claims.masks_with_causal):
        keep = torch.ones(request.key.shape[0], request.key.shape[2], dtype=torch.bool)
        keep[0, -7:] = False
        variants[f"{mode}, padded"] = replace(request, key_mask=keep)
    if subject.claims.packing is not None:
        one = request.on(*(tensor[:1] for tensor in request.tensors))
        bounds = torch.tensor([0, 20, 22, request.query.shape[2]], dtype=torch.int32)
        variants[f"{mode}, packed"] = replace(one, cu_seqlens=bounds)
    for case, variant in variants.items():
        yield subject.judge(case, variant)
        if subject.claims.gradients:
            yield _judge_gradients(subject, f"gradients, {case}", variant)


def dropout(subject: Subject) -> Iterator[CaseResult]:
    """Dropout is unbiased, drawn for every row from torch's generator, and the same backward as forward."""
    for mode, causal in subject.modes():
        request = replace(subject.draw(1, 2, 24, is_causal=causal), dropout_p=0.25)
        usual = subject(replace(request, dropout_p=0.0)).double()
        many = request.on(*(tensor.expand(DROPOUT_ROWS, -1, -1, -1).contiguous() for tensor in request.tensors))

        def seeded(seed: int, many: Request = many) -> Tensor:
            torch.manual_seed(seed)
            return subject(many).double()

        first = seeded(0)
        yield CaseResult(f"same seed, {mode}", torch.equal(first, seeded(0)), "equal outputs", "different outputs")
        yield CaseResult(f"other seed, {mode}", not torch.equal(first, seeded(1)), "different outputs", "equal outputs")
        # deviations in units of the standard error: 1 where unbiased
        deviation = (first.mean(0) - usual) / (first.std(0) / math.sqrt(DROPOUT_ROWS)).clamp(min=1e-12)
        score = float(deviation.square().mean().sqrt())
        case = f"mean of {DROPOUT_ROWS} equal rows, {mode}"
        yield CaseResult(case, score < 1.5, "within 1.5 standard errors", f"{score:.2f}")
        if subject.claims.gradients:
            yield _same_mask_backward(subject, f"gradient, {mode}", request)


def _same_mask_backward(subject: Subject, case: str, request: Request) -> CaseResult:
    """The output is linear in the value, so <gradient, value> is <weight, output> if both used the same mask."""
    value = request.value.clone().requires_grad_()
    torch.manual_seed(3)
    out = subject(replace(request, value=value))
    (gradient,) = torch.autograd.grad(out, value, torch.ones_like(out))
    output, expected = (gradient * request.value).sum().double(), out.detach().double().sum()
    size = out.detach().double().abs().sum()
    return within(case, float((output - expected).abs() / size), subject.stable)


def _judge_or_finite(subject: Subject, case: str, request: Request) -> CaseResult:
    if subject.claims.defined:
        return subject.judge(case, request)
    finite = bool(torch.isfinite(subject(request)).all())
    return CaseResult(case, finite, "a finite output", "finite" if finite else "not finite")


def _judge_gradients(subject: Subject, case: str, request: Request) -> CaseResult:
    expected = stacked_gradients(subject.expected)(request.cast(torch.float64))
    return within(case, relative_error(stacked_gradients(subject)(request), expected), subject.limit(request, True))


def _slope(subject: Subject, case: str, request: Request) -> CaseResult:
    """The gradient along random directions against central differences."""
    slopes = gradients(subject, request)
    generator = torch.Generator().manual_seed(5)
    errors = []
    for place, slope in enumerate(slopes):
        direction = torch.randn(slope.shape, generator=generator, dtype=torch.float64)
        sides = []
        for sign in (1.0, -1.0):
            tensors = list(request.tensors)
            tensors[place] = tensors[place] + sign * STEP * direction
            sides.append(subject(request.on(*tensors)))
        weight = torch.randint(-4, 5, sides[0].shape, generator=torch.Generator().manual_seed(99)).double() / 2
        measured = float(((sides[0] - sides[1]) * weight).sum() / (2 * STEP))
        derivative = float((slope * direction).sum())
        # in units of the slope along the gradient itself
        errors.append(abs(derivative - measured) / max(float(slope.norm()), 1e-12))
    return within(case, max(errors), 1e-6)
