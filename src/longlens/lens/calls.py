"""Statistics of an attention call that an observer received (`longlens.ops.observe`)."""

from __future__ import annotations

from collections.abc import Sequence

from longlens.errors import InputError
from longlens.lens.collect.collector import Collector
from longlens.lens.scan import scan
from longlens.lens.statistic import Statistic
from longlens.ops.observe import AttentionCall


def scan_call(
    call: AttentionCall, collect: Sequence[Collector], heads: Sequence[int] | None = None
) -> dict[str, Statistic]:
    """`longlens.scan` of a call, or of some of its `heads`, checked against the attention's own output.

    Under dropout the weights are those before it, and nothing is checked, since they do not give the output.

    Raises what `scan` raises, and `InputError` for heads that do not exist.
    """
    check_heads(heads, call.query.shape[1])
    if heads is not None:
        call = call.of_heads(heads)
    settings = dict(call.settings)
    checked = not settings.pop("dropout_p", 0.0) and call.output is not None
    return scan(
        call.query, call.key, collect=[collector.of_call(call) for collector in collect],
        value=call.value if checked else None, output=call.output if checked else None,
        where=f"layer {call.layer} ({call.name})", **settings,
    )  # fmt: skip


def check_heads(heads: Sequence[int] | None, count: int) -> None:
    """Raise `InputError` unless all `heads` exist."""
    if heads is not None and (not heads or any(not 0 <= head < count for head in heads)):
        raise InputError(f"expected heads of 0..{count - 1}, at least one, got {list(heads)}")
