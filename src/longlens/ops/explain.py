"""Say beforehand what a call would do: which path, how much memory, and why not another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longlens.errors import DtypeError
from longlens.ops.biases import Bias
from longlens.ops.choose import refusals
from longlens.ops.exact import packed
from longlens.ops.exact.exact import ORDER, Exact, choose_path, path_refusals
from longlens.ops.inputs import Inputs, check_inputs
from longlens.ops.masks import Rule
from longlens.ops.method import Method
from longlens.ops.registry import BY_NAME, METHOD_INFOS, resolve_method
from longlens.ops.sparse.banded import head_start
from longlens.ops.sparse.pattern import Pattern

# what libraries and small tensors take however short the input
BASE_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Explanation:
    """What `longlens.attention` would do.

    `path` names the code that runs ("refused" where none does); `memory` and `time` are orders in the length N;
    `peak_bytes` is the predicted growth of memory over the inputs, forward, or forward and backward where a gradient is
    asked for; `why_not` gives the reasons against each other path; `other_methods` those against each other method.
    """

    method: str
    path: str
    memory: str
    time: str
    peak_bytes: int
    why_not: dict[str, list[str]]
    other_methods: dict[str, list[str]]
    request: str

    def __str__(self) -> str:
        lines = [f"request   {self.request}", f"method    {self.method}", f"path      {self.path}"]
        if self.path != "refused":
            lines += [
                f"memory    order {self.memory}, about {format_bytes(self.peak_bytes)} beyond the inputs",
                f"time      order {self.time}",
            ]
        lines += [f"not       {path}: {'; '.join(reasons)}" for path, reasons in self.why_not.items()]
        by_reason: dict[str, list[str]] = {}
        for name, reasons in self.other_methods.items():
            by_reason.setdefault("; ".join(reasons), []).append(name)
        lines.append(f"could     {', '.join(by_reason.pop('', ['none']))}")
        lines += [f"could not {', '.join(names)}: {reasons}" for reasons, names in by_reason.items()]
        return "\n".join(lines)


def explain(
    query: Tensor | tuple[int, ...],
    key: Tensor | tuple[int, ...] | None = None,
    value: Tensor | tuple[int, ...] | None = None,
    attn_mask: Rule | Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    method: Method | str = "exact",
    key_mask: Tensor | bool | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Bias | Tensor | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: Tensor | bool | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    requires_grad: bool | None = None,
) -> Explanation:
    """What `longlens.attention` would do with these arguments; nothing is computed.

    Takes what `attention` takes. `query`, `key` and `value` may be shapes, with `dtype` (float32) and `device`
    ("cpu"); key and value default to the query's. `key_mask=True` and `sinks=True` stand for any key mask and any
    sinks. `requires_grad` asks for a backward pass.

    Raises `InputError`, `MaskError`, `DtypeError` or `MethodError` as `attention` does. A request that the method
    refuses is explained, not raised.
    """
    key = query if key is None else key
    value = key if value is None else value
    kind = (
        torch.device(device).type if device is not None else query.device.type if isinstance(query, Tensor) else "cpu"
    )
    dtype = dtype or (query.dtype if isinstance(query, Tensor) else torch.float32)
    q, k, v = (_as_meta(tensor, dtype) for tensor in (query, key, value))
    mask = _flag_as_meta(key_mask, torch.empty(k.shape[0], k.shape[2], dtype=torch.bool, device="meta"))
    if requires_grad is None:
        requires_grad = any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (query, key, value))
    chosen = resolve_method(method)
    if isinstance(sinks, bool):
        sinks = torch.empty(q.shape[1], device="meta") if sinks else None
    inputs = check_inputs(
        q, k, v, attn_mask, dropout_p, is_causal, scale, mask, cu_seqlens, bias, return_lse, softcap, sinks
    )
    inputs = replace(inputs, assumed_device=kind, assumed_grad=requires_grad)
    entry = BY_NAME.get(chosen.name)
    against = (refusals(entry, inputs) if entry else []) + chosen.refusals(inputs)
    path, why_not = ("refused", {chosen.name: against}) if against else _path(chosen, inputs)
    quadratic = path == "math"
    return Explanation(
        method=str(chosen),
        path=path,
        memory="N^2" if quadratic else entry.memory if entry else "N",
        time=entry.time if entry else "sum of the members'",
        peak_bytes=0 if against else predict_bytes(chosen, path, inputs),
        why_not=why_not,
        other_methods={other.name: refusals(other, inputs) for other in METHOD_INFOS if other.name != chosen.name},
        request=inputs.describe(),
    )


def _as_meta(tensor: Tensor | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if isinstance(tensor, Tensor):
        return tensor.detach().to("meta")
    if not isinstance(tensor, (tuple, list, torch.Size)):
        raise DtypeError(f"expected a tensor or a shape (batch, heads, length, width), got {type(tensor).__name__}")
    return torch.empty(tuple(tensor), dtype=dtype, device="meta")


def _flag_as_meta(given: Tensor | bool | None, any_tensor: Tensor) -> Tensor | None:
    """A tensor without its numbers; True stands for any, False for none."""
    if isinstance(given, Tensor):
        return given.to("meta")
    return any_tensor if given else None


def _path(method: Method, inputs: Inputs) -> tuple[str, dict[str, list[str]]]:
    """The path, and why not the others."""
    if isinstance(method, Exact):
        path = choose_path(inputs) if method.path == "auto" else method.path
        reasons = path_refusals(inputs)
        why = f"{path} was named" if method.path != "auto" else f"{path} comes first"
        if path == "sdpa" and packed.kernel_for(inputs) is not None:
            path, why = "packed", "one kernel serves all sequences at once"
        idle = {
            "math": "quadratic memory: runs only when named",
            "flex": "compiles anew for each shape: runs only when named",
        }
        return path, {
            other: against or [why if other in ORDER else idle[other]]
            for other, against in reasons.items()
            if other != path
        }
    if isinstance(method, Pattern):
        fast = head_start(method.strata(), inputs) is not None and not inputs.need_lse and not inputs.dropout
        banded = "banded (overlapping views in PyTorch's fused kernel)"
        if fast:
            return banded, {"tiles": ["runs only where the window meets the ends"]}
        return "tiles", {
            banded: ["serves one window on a CPU, without masks, bias, softcap, sinks, dropout or log-sum-exp"]
        }
    return ("tiles" if method.name == "lsh" else method.name), {}


def predict_bytes(method: Method, path: str, inputs: Inputs) -> int:
    """Predicted growth of memory over the inputs, in bytes."""
    batch, heads, queries, _ = inputs.query.shape
    one = inputs.query.element_size()
    output = batch * heads * queries * inputs.value.shape[3] * one
    scratch = method.peak_elements(inputs) * one
    if inputs.query.dtype == torch.float16 and inputs.device_type == "cpu":
        # float32 copies of the inputs and of the output, and scratch in float32
        scratch = 2 * (scratch + output) + 4 * sum(t.numel() for t in (inputs.query, inputs.key, inputs.value))
    tiled = path not in ("sdpa", "packed", "flex", "math")
    saved = 4 * batch * heads * queries * (inputs.need_lse or inputs.needs_grad)
    if inputs.cu_seqlens:
        output *= 2
    if not inputs.needs_grad:
        return BASE_BYTES + output + saved + scratch
    grads = sum(tensor.numel() for tensor in (inputs.query, inputs.key, inputs.value))
    # tiles sum gradients in float32 and hold weights, their gradient and that of the scores
    wide = max(4, one) * grads if tiled else 0
    return BASE_BYTES + 2 * output + saved + grads * one + (wide if one < 4 else 0) + (4 if tiled else 1) * scratch


def format_bytes(count: int) -> str:
    """1536 -> '1.5 KiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
