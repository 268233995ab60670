"""Who can serve a request: refusals with reasons, and the names of the methods that can."""

from __future__ import annotations

from longlens.errors import UnsupportedError
from longlens.ops.inputs import Inputs
from longlens.ops.method import Method
from longlens.ops.registry import BY_NAME, METHOD_INFOS, MethodInfo


def refusals(entry: MethodInfo, inputs: Inputs) -> list[str]:
    """Why the method of `entry` cannot serve `inputs`; empty where it can."""
    wants = {
        "no causal form exists": inputs.causal and not entry.causal,
        "takes no attn_mask: only key_mask, cu_seqlens and is_causal": inputs.rule is not None and not entry.masks,
        "takes no additive bias": inputs.bias is not None and not entry.bias,
        "has no attention weights to drop": inputs.dropout > 0 and not entry.dropout,
        "has no exact log-sum-exp": inputs.need_lse and not entry.lse,
        "forms no scores to cap": inputs.softcap is not None and not entry.softcap,
        "has no softmax that a sink could join": inputs.sinks is not None and not entry.sinks,
    }
    return [reason for reason, refused in wants.items() if refused]


def refuse_unless_able(method: Method, inputs: Inputs) -> None:
    """Raise `UnsupportedError` with reasons and alternatives unless `method` can serve `inputs`."""
    entry = BY_NAME.get(method.name)
    reasons = (refusals(entry, inputs) if entry else []) + method.refusals(inputs)
    if not reasons:
        return
    able = [other.name for other in METHOD_INFOS if other.name != method.name and not refusals(other, inputs)]
    raise UnsupportedError(
        f"method '{method}' cannot serve this request\n"
        f"  request: {inputs.describe()}\n" + "".join(f"  reason:  {reason}\n" for reason in reasons) +
        f"  methods that can: {', '.join(able) or 'none'}"
    )  # fmt: skip
