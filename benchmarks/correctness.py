"""Whether a contender computes what it says: errors against attention by its definition, in float64 on sampled rows.

Nothing of a contender is timed or reported before `check` has passed on a short task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contenders import BY_NAME, build, pattern
from longlens.testing import Request, claims_of
from tasks import Task, keep

ROWS = 64
GATE_LENGTH = 512  # or the shortest that a contender takes
# relative error on GATE_LENGTH tokens above which nothing of a contender is reported: it computes something else
GATE = {"float32": 1e-4, "bfloat16": 2e-2}
GATE_APPROXIMATE = {"float32": 1e-3, "bfloat16": 1e-1}


# ---- the definition, on sampled rows


class Definition:
    """Rows of softmax attention in float64, and of its query gradient, for a task's inputs; never N x N."""

    def __init__(self, task: Task, rows: int = ROWS) -> None:
        self.task = task
        generator = torch.Generator().manual_seed(1)
        # the first and the last row always: global tokens and edges are there
        drawn = torch.randperm(task.length - 2, generator=generator)[: rows - 2].sort().values + 1
        self.rows = torch.cat([torch.tensor([0]), drawn, torch.tensor([task.length - 1])]).to(task.device)
        self._known: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}

    def _keep(self, pairs: str) -> Tensor | None:
        """(H|1, rows, N) bool, or None: which pairs `pairs` names."""
        place = torch.arange(self.task.length, device=self.task.device)
        if pairs == "all":
            return None
        if pairs == "padded":
            return keep(self.task)[0].expand(1, len(self.rows), -1)
        if pairs == "causal":
            return (place[None] <= self.rows[:, None])[None]
        allowed = pattern(pairs, self.task.length).allowed(self.rows[:, None], place[None], self.task.length)
        return allowed.reshape(-1, *allowed.shape[-2:])

    def of(self, pairs: str, value_width: int | None = None) -> tuple[Tensor, Tensor]:
        """Output (H, rows, Dv) and query gradient (H, rows, D) for `output_gradient`, float64."""
        if (pairs, value_width) in self._known:
            return self._known[pairs, value_width]
        q, k, v = self.task.draw(value_width)
        above = output_gradient(self.task, value_width or self.task.width)
        keep = self._keep(pairs)
        outputs, grads = [], []
        for head in range(self.task.heads):
            key, value = k[0, head].double(), v[0, head].double()
            scores = q[0, head, self.rows].double() @ key.T * self.task.width**-0.5
            if keep is not None:
                scores = scores.masked_fill(~keep[head % keep.shape[0]], -torch.inf)
            weights = scores.softmax(-1)
            out = weights @ value
            up = above[0, head, self.rows].double()
            slope = weights * (up @ value.T - (up * out).sum(-1, keepdim=True))
            outputs.append(out)
            grads.append(slope @ key * self.task.width**-0.5)
        self._known[pairs, value_width] = torch.stack(outputs), torch.stack(grads)
        return self._known[pairs, value_width]

    def mean_of_values(self) -> float:
        """Relative error of returning the mean of the values everywhere: what an approximator has to beat."""
        want = self.of("all")[0]
        v = self.task.draw()[2][0].double()
        return relative(v.mean(1, keepdim=True).expand_as(want), want)


def output_gradient(task: Task, width: int) -> Tensor:
    """What is fed to the backward pass: (1, H, N, width), standard normal."""
    generator = torch.Generator().manual_seed(2)
    shape = (1, task.heads, task.length, width)
    return torch.randn(shape, generator=generator).to(task.device, getattr(torch, task.dtype))


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| (Frobenius), in float64."""
    return float((got.double() - want).norm() / want.norm())


# ---- one call


def prepare(contender: str, task: dict[str, Any] | None = None, **more: Any) -> Callable[[], object]:
    """What is timed, and what `longlens.testing.peak_growth` measures: forward, or forward and backward."""
    task_ = Task(**{**(task or {}), **more})
    call = build(contender, task_)
    if not task_.backward:

        def forward() -> object:
            with torch.no_grad():
                return call.run()

        return forward
    with torch.no_grad():
        width = BY_NAME[contender].value_width or task_.width
        above = output_gradient(task_, width)
    shaped: list[Tensor] = []

    def both() -> object:
        out = call.run()
        if not shaped:
            shaped.append(_like(out, above))
        return torch.autograd.grad(out, call.leaves, shaped[0])

    return both


def _like(out: Tensor, above: Tensor) -> Tensor:
    """`above` (1, H, N, D) in the layout of `out`."""
    if out.shape == above.shape:
        return above
    if out.ndim == 3 and out.shape[0] == 1:
        return above.transpose(1, 2).flatten(2).contiguous()
    raise ValueError(f"no layout known for an output of shape {tuple(out.shape)}")


def errors(contender: str, task: Task, definition: Definition) -> dict[str, float | None]:
    """Relative error on the sampled rows against the float64 definition.

    `error`: against what the contender says it computes (its own pairs); `error_full`: against attention over all
    pairs; with a backward pass also `error_query_grad`.
    """
    line = BY_NAME[contender]
    if line.pairs == "":
        return {"error": None, "error_full": None}
    call = build(contender, task)
    with torch.set_grad_enabled(task.backward):
        raw = call.run()
    out = call.output(raw.detach())[0][:, definition.rows]
    want, want_grad = definition.of(line.pairs, line.value_width)
    found: dict[str, float | None] = {
        "error": relative(out, want),
        "error_full": relative(out, definition.of("all", line.value_width)[0]),
    }
    if task.backward:
        above = _like(raw, output_gradient(task, out.shape[-1]))
        grads = torch.autograd.grad(raw, call.leaves, above)
        found["error_query_grad"] = relative(call.query_grad(grads)[0][:, definition.rows], want_grad)
    return found


def check(contender: str, task: Task, definition: Definition) -> str:
    """What is wrong with a contender on a short task; "" where nothing is. Speed only on green."""
    line = BY_NAME[contender]
    call = build(contender, task)
    with torch.set_grad_enabled(task.backward):
        raw = call.run()
    out = call.output(raw.detach())
    want = (1, task.heads, task.length, line.value_width or task.width)
    if tuple(out.shape) != want:
        return f"output of shape {tuple(out.shape)}, expected {want}"
    if not bool(out.isfinite().all()):
        return "the output is not finite"
    if line.pairs == "":
        return ""
    if line.exact:
        found = errors(contender, task, definition)
        limit = GATE[task.dtype]
        bad = [f"{name} {value:.2g}" for name, value in found.items()
               if name != "error_full" and value is not None
               and not value <= limit * (4 if "grad" in name else 1)]  # fmt: skip
        return f"relative {' and '.join(bad)} against float64, limit {limit}" if bad else ""
    if line.ours and hasattr(line.build, "args"):
        if not line.build.args:
            return ""
        definition_of = claims_of(line.build.args[0]).definition
        assert definition_of is not None
        error = relative(out, definition_of(Request(*(tensor.double() for tensor in task.draw()))))
        limit = GATE_APPROXIMATE[task.dtype]
        return f"relative error {error:.2g} against its own definition, limit {limit}" if not error <= limit else ""
    return ""
