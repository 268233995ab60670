"""Softmax attention over tiles as one differentiable function: the engine under exact and sparse methods.

What is kept between the passes is linear in the length. Second derivatives are refused (`UnsupportedError`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longlens.errors import UnsupportedError
from longlens.ops.outputs import AttentionOutput
from longlens.ops.tiles.backward import backward
from longlens.ops.tiles.forward import forward
from longlens.ops.tiles.problem import TiledProblem


def attend_tiles(problem: TiledProblem) -> AttentionOutput:
    """Compute the problem. Differentiable once in query, key, value, sinks and the bias's parameters."""
    inputs = problem.inputs
    seed = int(torch.randint(2**62, ()).item()) if inputs.dropout else 0
    biases = inputs.bias.parameters() if inputs.bias else ()
    # the tensors travel as arguments, where autograd sees them and checkpointing can free them
    bare = replace(
        inputs.shapes(),
        bias=inputs.bias.with_parameters(tuple(b.detach() for b in biases)) if inputs.bias else None,
        sinks=None if inputs.sinks is None else inputs.sinks.detach(),
    )
    learned = torch.is_grad_enabled() and any(bias.requires_grad for bias in biases)
    problem = replace(problem, inputs=bare, bias_grad=learned)
    output, lse = _TileAttention.apply(problem, seed, inputs.query, inputs.key, inputs.value, inputs.sinks, *biases)
    return AttentionOutput(output, lse if inputs.need_lse else None)


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        problem: TiledProblem,
        seed: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        *biases: Tensor,
    ) -> Any:
        needs_backward = any(ctx.needs_input_grad)
        output, lse = forward(problem, seed, query, key, value, sinks, needs_backward)
        ctx.problem, ctx.seed, ctx.count = replace(problem, head_start=None), seed, len(biases)
        if needs_backward:
            ctx.save_for_backward(query, key, value, output, lse, sinks, *biases)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_lse: Tensor | None) -> Any:
        grads = _TileAttentionBackward.apply(ctx.problem, ctx.seed, d_output, d_lse, *ctx.saved_tensors)
        if not ctx.problem.bias_grad:
            grads = (*grads, *(None for _ in range(ctx.count)))
        return (None, None, *grads)


class _TileAttentionBackward(torch.autograd.Function):
    """A function of its own so that differentiating twice meets a clear refusal."""

    @staticmethod
    def forward(
        ctx: Any, problem: TiledProblem, seed: int, d_output: Tensor | None, d_lse: Tensor | None, *saved: Any
    ) -> Any:
        return backward(problem, seed, (d_output, d_lse), saved[:6], saved[6:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(
            "second derivatives are not supported by the blockwise path; use method='exact:path=math' (quadratic "
            "memory) or an approximator such as 'linear', whose gradients are differentiable"
        )
