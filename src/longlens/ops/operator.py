"""`longlens.attention` under `torch.compile` and `torch.export`: one operator that the compiler does not look into.

The engine decides by values (whether a tile has a masked pair, whether a sum is finite) and walks over as many tiles as
the length asks for, neither of which a compiler can trace. So a compiled program holds a single operator,
`longlens::attention`, which runs the same code as an uncompiled call and gives the same numbers. Tensors are its
arguments; what is not a tensor travels as text: the method, mask rules and bias rules.

The backward pass of the operator computes the forward pass again, so that nothing but the arguments is kept between the
two. Dropout (both passes would have to draw the same numbers) and rules of other kinds cannot be part of a compiled
program: the compiler leaves such a call out, as it does with `torch.compiler.disable`, or says so under fullgraph=True.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longlens.errors import MethodError
from longlens.ops.biases import Alibi, Bias, RelativePosition
from longlens.ops.choose import refuse_unless_able
from longlens.ops.inputs import check_inputs, mask_or_bias, wide_dtype
from longlens.ops.masks import AllOf, Causal, Prefix, Rule, SameDocument
from longlens.ops.method import Method
from longlens.ops.registry import parse_method
from longlens.ops.run import run_attention

# names of rules that are no methods
CAUSAL, PREFIX, DOCUMENTS = "causal", "prefix", "documents"


def can_trace(
    method: Method | str, attn_mask: Rule | Tensor | None, dropout_p: float, bias: Bias | Tensor | None
) -> bool:
    """Whether a call can be put into a compiled program: no dropout, and a method and rules that have a text."""
    rules = attn_mask.rules if isinstance(attn_mask, AllOf) else (attn_mask,)
    documents = sum(isinstance(rule, SameDocument) for rule in rules)
    known = all(rule is None or isinstance(rule, (Tensor, Causal, Prefix, SameDocument, Method)) for rule in rules)
    return (
        not dropout_p
        and known
        and (isinstance(method, str) or _has_text(method))
        and documents <= 1
        and (bias is None or isinstance(bias, (Tensor, Alibi, RelativePosition)))
    )


def attention_traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Rule | Tensor | None,
    is_causal: bool,
    scale: float | None,
    method: Method | str,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bias: Bias | Tensor | None,
    return_lse: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `longlens.attention` puts into a compiled program where `can_trace`; arguments and results are its own."""
    # so that a floating mask gets the gradient of a bias
    attn_mask, bias = mask_or_bias(attn_mask, bias)
    mask, rule = _rule_text(attn_mask)
    table, bias_rule = _bias_text(bias)
    text = method if isinstance(method, str) else _text(method)
    output, lse = torch.ops.longlens.attention(
        query, key, value, mask, key_mask, cu_seqlens, table, sinks, text, rule, bias_rule, is_causal, scale, softcap,
        return_lse,
    )  # fmt: skip
    return (output, lse) if return_lse else output


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _text(method: object) -> str:
    return str(method)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_text(method: Method) -> bool:
    """Whether the string form of a method gives the method; that of a Linformer that learns does not."""
    try:
        return str(parse_method(str(method))) == str(method)
    except MethodError:
        return False


def _rule_text(rule: Rule | Tensor | None) -> tuple[Tensor | None, str]:
    """A mask rule as the tensor that it holds and a text: `"causal&window:16&documents"`."""
    if rule is None or isinstance(rule, Tensor):
        return rule, ""
    tensor: Tensor | None = None
    texts: list[str] = []
    for member in rule.rules if isinstance(rule, AllOf) else (rule,):
        if isinstance(member, Causal):
            texts.append(CAUSAL)
        elif isinstance(member, Prefix):
            texts.append(f"{PREFIX}:{member.length}")
        elif isinstance(member, SameDocument):
            tensor = member.documents
            texts.append(DOCUMENTS)
        else:
            texts.append(_text(member))
    return tensor, "&".join(texts)


def _read_rule(tensor: Tensor | None, text: str) -> Rule | Tensor | None:
    if not text:
        return tensor
    rules: list[Rule] = []
    for part in text.split("&"):
        name, _, argument = part.partition(":")
        if name == CAUSAL:
            rules.append(Causal())
        elif name == PREFIX:
            rules.append(Prefix(int(argument)))
        elif name == DOCUMENTS:
            assert tensor is not None
            rules.append(SameDocument(tensor))
        else:
            pattern = parse_method(part)
            assert isinstance(pattern, Rule)
            rules.append(pattern)
    return rules[0] if len(rules) == 1 else AllOf(tuple(rules))


def _bias_text(bias: Bias | Tensor | None) -> tuple[Tensor | None, str]:
    """A bias as the tensor that it holds and a text: `"alibi:8"`, `"relative:t5,128"`."""
    if bias is None or isinstance(bias, Tensor):
        return bias, ""
    if isinstance(bias, Alibi):
        return None, f"alibi:{bias.heads}"
    assert isinstance(bias, RelativePosition)
    return bias.table, f"relative:{bias.kind},{bias.max_distance}"


def _read_bias(tensor: Tensor | None, text: str) -> Bias | Tensor | None:
    name, _, arguments = text.partition(":")
    if name == "alibi":
        return Alibi(int(arguments))
    if name == "relative":
        assert tensor is not None
        kind, distance = arguments.split(",")
        return RelativePosition(tensor, kind, int(distance))
    return tensor


@torch.library.custom_op("longlens::attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    method: str,
    rule: str,
    bias_rule: str,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, Nq, Dv) and log-sum-exp (B, H, Nq), the latter empty where it is not asked for; both contiguous."""
    out = run_attention(
        query, key, value, _read_rule(attn_mask, rule), 0.0, is_causal, scale, method=method, key_mask=key_mask,
        cu_seqlens=cu_seqlens, bias=_read_bias(bias, bias_rule), return_lse=return_lse, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    output, lse = out if isinstance(out, tuple) else (out, _no_lse(query))
    return output.contiguous(), lse.contiguous()


def _no_lse(query: Tensor) -> Tensor:
    return query.new_empty((0,), dtype=wide_dtype(query.dtype))


@_operator.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None,
    cu_seqlens: Tensor | None, bias: Tensor | None, sinks: Tensor | None, method: str, rule: str, bias_rule: str,
    is_causal: bool, scale: float | None, softcap: float | None, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # boundaries are numbers, which the compiler does not have: they are checked when the program runs
    inputs = check_inputs(
        query, key, value, _read_rule(attn_mask, rule), 0.0, is_causal, scale, key_mask, None,
        _read_bias(bias, bias_rule), return_lse, softcap, sinks,
    )  # fmt: skip
    refuse_unless_able(parse_method(method), inputs)
    shape = query.shape[:3]
    lse = query.new_empty(shape, dtype=wide_dtype(query.dtype)) if return_lse else _no_lse(query)
    return query.new_empty((*shape, value.shape[3])), lse


@torch.library.custom_op("longlens::attention_backward", mutates_args=())
def _operator_backward(
    d_output: Tensor,
    d_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    method: str,
    rule: str,
    bias_rule: str,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    return_lse: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients of query, key, value, bias and sinks that are `wanted`, in this order."""
    # inside an operator autograd is switched off below the reach of enable_grad; this switches it on again
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip((query, key, value, bias, sinks), wanted, strict=True)
        ]
        q, k, v, b, s = leaves
        assert q is not None and k is not None and v is not None  # noqa: PT018
        out = run_attention(
            q, k, v, _read_rule(attn_mask, rule), 0.0, is_causal, scale, method=method, key_mask=key_mask,
            cu_seqlens=cu_seqlens, bias=_read_bias(b, bias_rule), return_lse=return_lse, softcap=softcap, sinks=s,
        )  # fmt: skip
        outputs = out if isinstance(out, tuple) else (out,)
        sources = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need and leaf is not None]
        grads = torch.autograd.grad(outputs, sources, (d_output, d_lse)[: len(outputs)], materialize_grads=True)
    return [grad.clone(memory_format=torch.contiguous_format) for grad in grads]


@_operator_backward.register_fake
def _(
    d_output: Tensor, d_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    key_mask: Tensor | None, cu_seqlens: Tensor | None, bias: Tensor | None, sinks: Tensor | None, method: str,
    rule: str, bias_rule: str, is_causal: bool, scale: float | None, softcap: float | None, return_lse: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    tensors = zip((query, key, value, bias, sinks), wanted, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, need in tensors if need and tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.settings = inputs[8:]


def _differentiate(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    places = (0, 1, 2, 6, 7)
    wanted = [ctx.needs_input_grad[place] for place in places]
    grads = torch.ops.longlens.attention_backward(d_output, d_lse, *ctx.saved_tensors, *ctx.settings, wanted)
    out: list[Tensor | None] = [None] * 15
    for place, grad in zip([place for place, need in zip(places, wanted, strict=True) if need], grads, strict=True):
        out[place] = grad
    return tuple(out)


_operator.register_autograd(_differentiate, setup_context=_save)
