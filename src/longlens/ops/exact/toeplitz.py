"""A bias of distances in PyTorch's fused CPU kernel: full speed, linear memory, and every gradient.

For biases that depend on key position minus query position alone: ALiBi, clipped tables, T5's buckets. How the operator
gets them is in `longlens.ops.exact.diagonals`; its backward pass takes the same view. The gradient of the bias itself
is in `longlens.ops.exact.distance_gradient`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longlens.errors import UnsupportedError
from longlens.ops.exact.diagonals import DEAD, Plan, blocks, lay_out, to_width
from longlens.ops.exact.distance_gradient import near_gradient
from longlens.ops.fused_cpu import attend_cpu, attend_cpu_backward, cpu_serves_masks
from longlens.ops.inputs import Inputs, all_finite, wide_dtype
from longlens.ops.outputs import AttentionOutput

# scales for which the column of a key mask stays finite and decides
SCALES = (1e-5, 1e5)


def refusals(inputs: Inputs) -> list[str]:
    """Why the fused CPU kernel cannot serve these inputs with their bias as a view."""
    if inputs.bias is None or not inputs.bias.by_distance:
        return ["it is for a bias of distances, such as Alibi and RelativePosition"]
    wants = {
        "only the CPU's kernel takes the bias as a view": inputs.device_type != "cpu",
        "this PyTorch has no fused CPU operator that passes our check": inputs.device_type == "cpu"
        and not cpu_serves_masks(inputs.query.dtype),
        "no gradient flows through its log-sum-exp": inputs.need_lse and inputs.needs_grad,
        "it would expand a mask rule to N x N": inputs.rule is not None,
        "it has no softcap": inputs.softcap is not None,
        "it has no sinks": inputs.sinks is not None,
        "it has no dropout": inputs.dropout > 0,
        "its queries end where its keys end": inputs.offset != inputs.keys - inputs.queries,
        "its key mask needs a scale from 1e-5 to 1e5": inputs.key_mask is not None
        and not SCALES[0] <= abs(inputs.scale) <= SCALES[1],
    }
    return [reason for reason, refused in wants.items() if refused]


def attend(inputs: Inputs) -> AttentionOutput:
    """softmax(scale q k^T + bias) v, causal or with a key mask, and the log-sum-exp."""
    assert inputs.bias is not None
    lowest, highest = 1 - inputs.keys, inputs.queries - 1
    reach = inputs.bias.reach
    low, high = (lowest, highest) if reach is None else (max(lowest, -reach), min(highest, reach))
    high = 0 if inputs.causal else high
    near = inputs.bias.between(low, high).to(wide_dtype(inputs.query.dtype))
    plan = Plan(inputs.scale, inputs.causal, inputs.key_mask, lowest, highest, low, high)
    output, lse = _Toeplitz.apply(inputs.query, inputs.key, inputs.value, near, plan)
    return AttentionOutput(output, lse if inputs.need_lse else None)


def scratch_elements(inputs: Inputs) -> int:
    """Reversed queries and output, keys and values widened by a key mask's column, and the bias, in elements of the
    inputs' dtype."""
    width = max(inputs.query.shape[3] + (inputs.key_mask is not None), inputs.value.shape[3])
    rows = inputs.query.numel() // inputs.query.shape[3]
    keys = inputs.key.numel() // inputs.key.shape[3]
    widened = width != inputs.query.shape[3] or width != inputs.value.shape[3]
    numbers = inputs.heads * (inputs.queries + inputs.keys) * 4 // inputs.query.element_size()
    return 2 * rows * width + 2 * widened * keys * width + numbers


def _forward(query: Tensor, key: Tensor, value: Tensor, near: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Output (B, H, Nq, Dv), and the log-sum-exp (B, H, Nq), -inf for a query without keys."""
    q, k, v, bias = operands = lay_out(query, key, value, near, plan)
    outputs, lses, done = [], [], 0
    for rows in blocks(plan, q.shape[2], k.shape[2]):
        keys = slice(rows.keys)
        output, lse = attend_cpu(q[:, :, rows.cut], k[:, :, keys], v[:, :, keys], plan.scale, mask=operands.mask(rows))
        outputs.append(output)
        lses.append(lse)
        done = rows.stop
    short = q.shape[2] - done
    if short:
        outputs.append(q.new_zeros(*q.shape[:2], short, v.shape[3]))
        lses.append(near.new_full((*q.shape[:2], short), -torch.inf))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    lse = lses[0] if len(lses) == 1 else torch.cat(lses, 2)
    output, lse = output[..., : value.shape[3]].flip(2), lse.flip(2)
    dead = lse < DEAD
    if bool(dead.any()):
        output, lse = output.masked_fill_(dead.unsqueeze(3), 0.0), lse.masked_fill_(dead, -torch.inf)
    lost = _lost(query, bias, k.shape[2])
    if lost is None:
        return output, lse
    return output.masked_fill(lost.unsqueeze(3), torch.nan), lse.masked_fill(lost, torch.nan)


def _lost(query: Tensor, bias: Tensor, keys: int) -> Tensor | None:
    """(B|1, H, Nq) bool, or None: queries with a score that is no number. The operator takes a row of NaN for one
    without keys and gives it 0."""
    lost = None if bool(all_finite(query)) else ~query.isfinite().all(3)
    if bool(bias.isnan().any()):
        # each query sees a stretch of the distances
        count = F.pad(bias.isnan().cumsum(1), (1, 0))
        seen = (count[:, keys:] > count[:, :-keys]).flip(1).unsqueeze(0)
        lost = seen if lost is None else lost | seen
    return lost


class _Toeplitz(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, near: Tensor, plan: Plan) -> Any:
        output, lse = _forward(query, key, value, near, plan)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, near, output, lse)
            ctx.plan = plan
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_lse: Tensor | None) -> Any:
        if d_output is None:
            return None, None, None, None, None
        grads = _ToeplitzBackward.apply(d_output, *ctx.saved_tensors, ctx.plan, ctx.needs_input_grad[3])
        return (*grads, None)


class _ToeplitzBackward(torch.autograd.Function):
    """A function of its own so that differentiating twice meets a clear refusal."""

    @staticmethod
    def forward(
        ctx: Any, d_output: Tensor, query: Tensor, key: Tensor, value: Tensor, near: Tensor, output: Tensor,
        lse: Tensor, plan: Plan, learned: bool,
    ) -> Any:  # fmt: skip
        return _backward(d_output, query, key, value, near, output, lse, plan, learned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(
            "second derivatives are not supported by the fused kernel; use method='exact:path=math' (quadratic memory) "
            "or an approximator such as 'linear', whose gradients are differentiable"
        )


def _backward(
    d_output: Tensor, query: Tensor, key: Tensor, value: Tensor, near: Tensor, output: Tensor, lse: Tensor, plan: Plan,
    learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The gradients of query, key, value and, where it is learned, of `near`."""
    q, k, v, _ = operands = lay_out(query, key, value, near, plan)
    dead = lse == -torch.inf
    if bool(dead.any()):
        # the operator knows of no empty row: nothing may reach its weights
        d_output, lse = d_output.masked_fill(dead.unsqueeze(3), 0.0), lse.masked_fill(dead, 0.0)
    d_o, o, lse = to_width(d_output.flip(2), v.shape[3]), to_width(output.flip(2), v.shape[3]), lse.flip(2)
    d_q = torch.zeros_like(q)
    d_k = d_v = torch.zeros(())
    for rows in blocks(plan, q.shape[2], k.shape[2]):
        cut, keys = rows.cut, slice(rows.keys)
        d_rows, d_keys, d_values = attend_cpu_backward(
            d_o[:, :, cut], q[:, :, cut], k[:, :, keys], v[:, :, keys], o[:, :, cut], lse[:, :, cut], plan.scale,
            mask=operands.mask(rows),
        )  # fmt: skip
        if rows.start == 0:
            # of all blocks it meets the most keys
            d_k, d_v = d_keys.to(near.dtype), d_values.to(near.dtype)
        else:
            d_k[:, :, keys] += d_keys
            d_v[:, :, keys] += d_values
        d_q[:, :, cut] = d_rows
    d_near = near_gradient(operands, d_o, o, lse, near, plan) if learned else None
    width = query.shape[3]
    return (
        d_q[..., :width].flip(2), d_k[..., :width].to(key.dtype), d_v[..., : value.shape[3]].to(value.dtype), d_near,
    )  # fmt: skip
