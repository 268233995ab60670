"""The function under test, called by one interface, with its expected results and their tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longlens.errors import LonglensError
from longlens.ops.reference import allowed_pairs
from longlens.testing.claims import Claims, Request, softmax_definition, softmax_lse
from longlens.testing.report import CaseResult, within

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 64, 16


class ConformanceError(LonglensError):
    """The function returned a value that is not an attention output."""


@dataclass(frozen=True)
class Subject:
    """An attention function and its claims. It gets its tensors on `device`; requests and results are on the CPU."""

    function: Callable[..., Any]
    claims: Claims
    target: str | None = None
    device: str = "cpu"

    def __call__(self, request: Request) -> Tensor:
        """The function's output, checked for shape and dtype."""
        there = request.to(self.device)
        output = self.function(*there.tensors, **self._keywords(there))
        return self._checked(request, output).cpu()

    def with_lse(self, request: Request) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        assert self.claims.lse is not None
        there = request.to(self.device)
        output = self.function(*there.tensors, **self._keywords(there), **{self.claims.lse: True})
        if not isinstance(output, tuple) or len(output) != 2:
            raise ConformanceError(f"expected (output, lse) with {self.claims.lse}=True, got {type(output).__name__}")
        if output[1].shape != request.query.shape[:3]:
            raise ConformanceError(f"expected lse {tuple(request.query.shape[:3])}, got {tuple(output[1].shape)}")
        return self._checked(request, output[0]).cpu(), output[1].cpu()

    def _keywords(self, request: Request) -> dict[str, Any]:
        claims = self.claims
        keywords: dict[str, Any] = dict(claims.keywords)
        if claims.causal is not None:
            keywords["is_causal"] = request.is_causal
        if request.scale is not None:
            keywords["scale"] = request.scale
        if request.dropout_p:
            keywords["dropout_p"] = request.dropout_p
        if request.attn_mask is not None:
            keywords["attn_mask"] = request.attn_mask
        if request.softcap is not None:
            keywords["softcap"] = request.softcap
        if request.sinks is not None:
            keywords["sinks"] = request.sinks
        if request.cu_seqlens is not None:
            assert claims.packing is not None
            keywords[claims.packing] = request.cu_seqlens
        if request.key_mask is not None:
            assert claims.key_mask is not None
            mask = request.key_mask if claims.key_mask_keep else ~request.key_mask
            keywords[claims.key_mask] = mask if claims.key_mask_shape == "BN" else mask[:, None, None, :]
        return keywords

    def _checked(self, request: Request, output: Any) -> Tensor:
        want = (*request.query.shape[:3], request.value.shape[3])
        if not isinstance(output, Tensor):
            raise ConformanceError(f"expected a tensor, got {type(output).__name__}")
        if tuple(output.shape) != want:
            raise ConformanceError(f"expected output {want}, got {tuple(output.shape)}")
        if output.dtype != request.query.dtype:
            raise ConformanceError(f"expected output in {request.query.dtype}, got {output.dtype}")
        return output

    # expected results

    def define(self, request: Request) -> Tensor:
        """The definition on the request's tensors in their dtype; for softmax kinds the result is float64."""
        if self.claims.definition is not None:
            return self.claims.definition(request)
        return self._exact_softmax(request)

    def expected(self, request: Request) -> Tensor:
        """The definition on the request's values in float64."""
        return self.define(request.cast(torch.float64))

    def expected_lse(self, request: Request) -> Tensor:
        """The log-sum-exp in float64, of exact and pattern kinds."""
        return softmax_lse(
            request.cast(torch.float64), self.claims.pattern_of(request.is_causal), self.claims.causal or "bottom-right"
        )

    def limit(self, request: Request, gradient: bool = False) -> float:
        """Twice the error of a plain implementation in the request's dtype; a correctly rounded result always passes.

        The plain implementation is the definition, where it computes in the dtype it is given, and otherwise softmax
        attention step by step over the same pattern, on the function's own device, held to its own float64 form.
        `gradient`: of the gradients.

        There is nothing beyond float64 to measure float64 with. There it is float32's limit scaled by the epsilons,
        with three bits of allowance, since the definition is then rounded as well and float32's rounding only a guide.
        """
        dtype, factor = request.query.dtype, 1.0
        if dtype == torch.float64:
            factor = 8 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            dtype, request = torch.float32, request.cast(torch.float32)
        plain: Callable[[Request], Tensor] = self._plain_softmax
        exact: Callable[[Request], Tensor] = self._exact_softmax
        if self.claims.definition is not None and self.claims.definition(request).dtype == dtype:
            plain = exact = self.claims.definition
        if gradient:
            plain, exact = stacked_gradients(plain), stacked_gradients(exact)
        error = relative_error(plain(request), exact(request.cast(torch.float64)))
        return factor * max(2 * error, torch.finfo(dtype).eps / 2)

    def _plain_softmax(self, request: Request) -> Tensor:
        # another device multiplies and adds in another order: what rounding explains is what it does there
        return plain_softmax(request.to(self.device), self.claims).cpu()

    def _exact_softmax(self, request: Request) -> Tensor:
        return softmax_definition(
            request, self.claims.pattern_of(request.is_causal), self.claims.causal or "bottom-right"
        )

    def judge(self, case: str, request: Request, rows: Tensor | slice | None = None) -> CaseResult:
        """Compare one call with the definition by the error rule; `rows` selects queries (an index of axis 2)."""
        output, expected = self(request), self.expected(request)
        if rows is not None:
            output, expected = output[:, :, rows], expected[:, :, rows]
        return within(case, relative_error(output, expected), self.limit(request))

    # requests that are tested

    @property
    def stable(self) -> float:
        """How far two computations of the same result may differ by rounding."""
        return 1000 * torch.finfo(self.claims.sharpest).eps

    def modes(self, masked: bool = False) -> Iterator[tuple[str, bool]]:
        """The values of `is_causal` that are claimed, with names; `masked`: those that go with other masks."""
        if self.claims.bidirectional:
            yield "bidirectional", False
        if self.claims.causal is not None and (self.claims.masks_with_causal or not masked):
            yield "causal", True

    def draw(
        self,
        batch: int = BATCH,
        heads: int = HEADS,
        length: int = LENGTH,
        width: int = WIDTH,
        *,
        keys: int | None = None,
        key_heads: int | None = None,
        value_width: int | None = None,
        dtype: torch.dtype | None = None,
        is_causal: bool = False,
        seed: int = 0,
    ) -> Request:
        """Standard normal tensors, the same values in every dtype up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        keys = length if keys is None else keys
        key_heads = heads if key_heads is None else key_heads

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return drawn.to(dtype or self.claims.sharpest)

        query = normal(batch, heads, length, width)
        key = normal(batch, key_heads, keys, width)
        value = normal(batch, key_heads, keys, width if value_width is None else value_width)
        return Request(query, key, value, is_causal=is_causal)

    def same(self, case: str, output: Tensor, expected: Tensor) -> CaseResult:
        """Compare two results, up to rounding."""
        return within(case, relative_error(output, expected), self.stable)


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error in float64; infinite where anything is not finite."""
    output, expected = output.detach().double(), expected.detach().double()
    if not bool(torch.isfinite(output).all()):
        return float("inf")
    distance, size = torch.linalg.vector_norm(output - expected), torch.linalg.vector_norm(expected)
    return float(distance / size) if float(size) > 0 else float(distance)


def plain_softmax(request: Request, claims: Claims) -> Tensor:
    """Softmax attention in the request's dtype, step by step: scores, mask, softmax, product."""
    align = claims.causal or "bottom-right"
    inputs = request.inputs()
    parts = [inputs] if inputs.cu_seqlens is None else list(inputs.sequences())
    outputs = []
    for part in parts:
        top_left = part.causal and align == "top-left" and part.offset != 0
        pairs = replace(part, causal=False) if top_left else part
        keep = allowed_pairs(pairs, claims.pattern_of(part.causal))
        if top_left:
            keep = keep.tril()
        key, value = (tensor.repeat_interleave(part.groups, 1) for tensor in (part.key, part.value))
        scores = part.query @ key.transpose(2, 3) * part.scale
        if part.softcap is not None:
            scores = part.softcap * torch.tanh(scores / part.softcap)
        empty = ~keep.any(-1, keepdim=True)
        scores = scores.masked_fill(~keep, -torch.inf).masked_fill(empty, 0.0)
        if part.sinks is not None:
            column = part.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        weights = torch.softmax(scores, -1)[..., : part.keys].masked_fill(empty, 0.0)
        outputs.append(weights @ value)
    return torch.cat(outputs, 2)


def gradients(function: Callable[[Request], Tensor], request: Request) -> tuple[Tensor, ...]:
    """Gradients of a fixed weighting of the output, with respect to query, key, value and, if given, sinks."""
    inputs = (*request.tensors, *(() if request.sinks is None else (request.sinks,)))
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(replace(request.on(*leaves[:3]), sinks=leaves[3] if len(leaves) > 3 else None))
    generator = torch.Generator(out.device).manual_seed(99)
    # small halves are the same number in every dtype
    weight = torch.randint(-4, 5, out.shape, generator=generator, device=out.device).to(out.dtype) / 2
    return torch.autograd.grad(out, leaves, weight)


def stacked_gradients(function: Callable[[Request], Tensor]) -> Callable[[Request], Tensor]:
    """The concatenated gradients, which the error rule compares."""

    def run(request: Request) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients(function, request)])

    return run
