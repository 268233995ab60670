"""Queries, keys, values, masks and scale as one checked value, so that nothing behind `attention()` checks again.

Axis letters and the meaning of masks: `longlens.shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from longlens.errors import DtypeError, InputError, MaskError
from longlens.ops.biases import Bias, TensorBias
from longlens.ops.bounds import bounds_of
from longlens.ops.masks import AllOf, Causal, Rule, TensorMask

# rows of half precision that `all_finite` adds up at a time
FINITE_ROWS = 1024
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Inputs:
    """Checked inputs of one attention call.

    query (B, H, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv). `offset` is the position of query 0, keys counting
    from 0: Nk - Nq at the entry point, so that causal masks align bottom-right.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    offset: int
    causal: bool = False
    rule: Rule | None = None
    key_mask: Tensor | None = None
    bias: Bias | None = None
    dropout: float = 0.0
    need_lse: bool = False
    # scores become softcap tanh(s / softcap) before bias and masks
    softcap: float | None = None
    # (H,) logits of a further key of each head, which holds no value and takes part of each row's mass
    sinks: Tensor | None = None
    cu_seqlens: tuple[int, ...] | None = None
    # the same as the tensor that was given, for kernels that read it on the device
    boundaries: Tensor | None = None
    # set by explain() for inputs that are shapes only
    assumed_device: str | None = None
    assumed_grad: bool = False

    @property
    def device_type(self) -> str:
        """ "cpu", "cuda", ..."""
        return self.assumed_device or self.query.device.type

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def groups(self) -> int:
        """Query heads to each key/value head."""
        return self.query.shape[1] // max(1, self.key.shape[1])

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def needs_grad(self) -> bool:
        learned = (*(self.bias.parameters() if self.bias else ()), *(() if self.sinks is None else (self.sinks,)))
        tensors = (self.query, self.key, self.value, *learned)
        return self.assumed_grad or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))

    def mask_rule(self) -> Rule | None:
        """Causal mask and mask rule as one rule; the key mask stays apart. None where every pair is allowed."""
        rules: list[Rule] = [Causal()] if self.causal else []
        if self.rule is not None:
            rules.append(self.rule)
        if not rules:
            return None
        return rules[0] if len(rules) == 1 else AllOf(tuple(rules))

    def shapes(self) -> Inputs:
        """The same inputs without their numbers: query, key and value keep shape, dtype and device, and no memory."""
        bare = (t.new_empty(()).expand(t.shape) for t in (self.query.detach(), self.key.detach(), self.value.detach()))
        query, key, value = bare
        return replace(self, query=query, key=key, value=value, assumed_grad=self.needs_grad)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same inputs with query, key and value in another dtype."""
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype))

    def rows(self) -> Iterator[Inputs]:
        """Each batch row as inputs of batch size 1."""
        # split once: a slice for each row would cost a full-size gradient for each
        parts = zip(self.query.split(1), self.key.split(1), self.value.split(1), strict=True)
        for index, (query, key, value) in enumerate(parts):
            yield replace(
                self,
                query=query,
                key=key,
                value=value,
                key_mask=None if self.key_mask is None else self.key_mask[index : index + 1],
                rule=None if self.rule is None else self.rule.row(index),
                bias=None if self.bias is None else self.bias.row(index),
                cu_seqlens=self._bounds_of_row(index),
                boundaries=None,
            )

    def _bounds_of_row(self, index: int) -> tuple[int, ...] | None:
        if self.cu_seqlens is None:
            return None
        first, last = index * self.queries, (index + 1) * self.queries
        return tuple(bound - first for bound in self.cu_seqlens if first <= bound <= last)

    def sequences(self) -> Iterator[Inputs]:
        """Each packed sequence, row by row, as inputs of its own; positions start at 0 in each."""
        assert self.cu_seqlens is not None
        if len(self.query) > 1:
            for row in self.rows():
                yield from row.sequences()
            return
        spans = list(pairwise(self.cu_seqlens))
        lengths = [stop - start for start, stop in spans]
        # split once, as in `rows`
        parts = (tensor.split(lengths, 2) for tensor in (self.query, self.key, self.value))
        for (start, stop), query, key, value in zip(spans, *parts, strict=True):
            yield replace(
                self,
                query=query,
                key=key,
                value=value,
                offset=0,
                key_mask=None if self.key_mask is None else self.key_mask[:, start:stop],
                rule=None if self.rule is None else self.rule.segment(start, stop),
                bias=None if self.bias is None else self.bias.segment(start, stop),
                cu_seqlens=None,
                boundaries=None,
            )

    def describe(self) -> str:
        """One line for error messages."""
        parts = [
            f"query {tuple(self.query.shape)}",
            f"key {tuple(self.key.shape)}",
            f"value {tuple(self.value.shape)}",
            str(self.query.dtype).removeprefix("torch."),
            self.device_type,
        ]
        flags = {
            "is_causal": self.causal,
            "attn_mask": self.rule is not None,
            "key_mask": self.key_mask is not None,
            "cu_seqlens": self.cu_seqlens is not None,
            "bias": self.bias is not None,
            f"dropout_p={self.dropout}": self.dropout > 0,
            "return_lse": self.need_lse,
            f"softcap={self.softcap}": self.softcap is not None,
            "sinks": self.sinks is not None,
        }
        return ", ".join(parts + [name for name, on in flags.items() if on])


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Rule | Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bias: Bias | Tensor | None,
    return_lse: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Inputs:
    """Check everything that `attention()` takes and gather it. Raises `InputError`, `MaskError` or `DtypeError`."""
    query, key, value = under_autocast(query, key, value)
    _check_tensors(query, key, value)
    if not 0.0 <= dropout_p < 1.0:
        raise InputError(f"expected dropout_p in [0, 1), got {dropout_p}")
    if isinstance(scale, Tensor):
        if scale.requires_grad or scale.numel() != 1:
            raise InputError(
                "expected scale to be a number: a tensor would lose its gradient, and its shape; multiply the query by "
                "it and give scale=1.0"
            )
        scale = float(scale)
    if scale is not None and not math.isfinite(scale):
        raise InputError(f"expected a finite scale, got {scale}")
    rule, bias = _check_mask(attn_mask, bias, query, key)
    if key_mask is not None:
        _check_key_mask(key_mask, key)
    if sinks is not None:
        _check_sinks(sinks, query)
    return Inputs(
        query=query,
        key=key,
        value=value,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        offset=key.shape[2] - query.shape[2],
        causal=bool(is_causal),
        rule=rule,
        key_mask=key_mask,
        bias=bias,
        dropout=float(dropout_p),
        need_lse=bool(return_lse),
        softcap=None if softcap is None else _check_softcap(softcap),
        sinks=sinks,
        cu_seqlens=None if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, query, key),
        boundaries=cu_seqlens,
    )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"expected {name} to be a torch.Tensor, got {type(tensor).__name__}")
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
    for name, tensor in named.items():
        if tensor.ndim != 4:
            raise InputError(f"expected {name} of shape (batch, heads, length, width), got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in named.items())
        raise DtypeError(f"expected query, key and value of one dtype, got {dtypes}; cast them first")
    if query.dtype not in FLOATS:
        raise DtypeError(f"expected float32, bfloat16, float16 or float64, got {query.dtype}")
    if not query.device == key.device == value.device:
        devices = ", ".join(f"{name} {tensor.device}" for name, tensor in named.items())
        raise InputError(f"expected query, key and value on one device, got {devices}")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise InputError(f"expected one batch size, got {shapes}; expand them first")
    if key.shape[1] != value.shape[1]:
        raise InputError(f"expected as many key heads as value heads, got {shapes}")
    if key.shape[1] == 0 or query.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise InputError(f"expected the query heads to be a multiple of the key heads, got {shapes}")
    if key.shape[2] != value.shape[2]:
        raise InputError(f"expected as many keys as values, got {shapes}")
    if query.shape[3] != key.shape[3] or query.shape[3] == 0:
        raise InputError(f"expected queries and keys of one width of at least 1, got {shapes}")


def under_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, cast under autocast as scaled_dot_product_attention casts them."""
    kind = query.device.type if isinstance(query, Tensor) else "meta"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor) -> Tensor:
        narrow = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if narrow else tensor

    return cast(query), cast(key), cast(value)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of log-sum-exps for inputs of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def all_finite(tensor: Tensor) -> Tensor:
    """Whether every number of a tensor (..., N, D) is finite, as a tensor of one bool."""
    # a sum is finite only if every term is; in halves it would overflow, and PyTorch widens them by a copy, which is
    # small for some rows at a time
    rows = tensor.shape[-2] if tensor.dtype == wide_dtype(tensor.dtype) else FINITE_ROWS
    parts = tensor.detach().split(max(1, rows), -2)
    return torch.stack([part.sum(dtype=wide_dtype(tensor.dtype)) for part in parts]).sum().isfinite()


def mask_or_bias(
    attn_mask: Rule | Tensor | None, bias: Bias | Tensor | None
) -> tuple[Rule | Tensor | None, Bias | Tensor | None]:
    """Mask and bias, with a floating mask as the bias that it is. Raises `MaskError` if there is another."""
    if not (isinstance(attn_mask, Tensor) and attn_mask.is_floating_point()):
        return attn_mask, bias
    if bias is not None:
        raise MaskError("a floating attn_mask is an additive bias: give it or `bias`, not both; add them first")
    return None, attn_mask


def _check_mask(
    attn_mask: Rule | Tensor | None, bias: Bias | Tensor | None, query: Tensor, key: Tensor
) -> tuple[Rule | None, Bias | None]:
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    attn_mask, bias = mask_or_bias(attn_mask, bias)
    rule: Rule | None = None
    if isinstance(attn_mask, Tensor):
        if attn_mask.dtype != torch.bool:
            raise MaskError(
                f"expected attn_mask of dtype bool with True = attend, got {attn_mask.dtype}; use mask.bool() if 1 "
                "means attend, ~mask.bool() if 1 means ignore (as in torch.nn.MultiheadAttention)"
            )
        _check_device("attn_mask", attn_mask, query)
        rule = TensorMask(_expandable("attn_mask", attn_mask, full))
    elif isinstance(attn_mask, Rule):
        rule = attn_mask.bind(*full[:2])
    elif attn_mask is not None:
        raise MaskError(f"expected attn_mask to be a rule (longlens.Window(256), ...) or a tensor, got {attn_mask!r}")
    if isinstance(bias, Tensor):
        if not bias.is_floating_point():
            raise MaskError(f"expected a floating bias, got {bias.dtype}; a bool mask goes to attn_mask")
        bias = TensorBias(_expandable("bias", bias, full))
    elif bias is not None and not isinstance(bias, Bias):
        raise MaskError(f"expected bias to be a rule (longlens.Alibi(...), ...) or a tensor, got {bias!r}")
    if bias is not None:
        bias.check(query.shape[1])
        for parameter in bias.parameters():
            _check_device("bias", parameter, query)
    return rule, bias


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    # explain() asks about shapes, on no device
    if tensor.device != query.device and query.device.type != "meta":
        raise InputError(
            f"expected {name} on the query's device {query.device}, got {tensor.device}; move it with .to(query.device)"
        )


def _expandable(name: str, tensor: Tensor, full: tuple[int, int, int, int]) -> Tensor:
    """`tensor` with four axes, each 1 or as in `full`."""
    shape = (1,) * (4 - tensor.ndim) + tuple(tensor.shape)
    if len(shape) != 4 or any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
        raise MaskError(f"expected {name} to broadcast to (B, H, Nq, Nk) = {full}, got {tuple(tensor.shape)}")
    return tensor.view(shape) if tensor.is_contiguous() else tensor.reshape(shape)


def _check_key_mask(key_mask: Tensor, key: Tensor) -> None:
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise MaskError(
            f"expected key_mask of dtype bool with True = keep, got {got}; use mask.bool() if 1 means keep, "
            "~mask.bool() if 1 means ignore (as in torch.nn.MultiheadAttention's key_padding_mask)"
        )
    _check_device("key_mask", key_mask, key)
    want = (key.shape[0], key.shape[2])
    if tuple(key_mask.shape) != want:
        raise MaskError(f"expected key_mask of shape (B, Nk) = {want}, got {tuple(key_mask.shape)}")


def _check_softcap(softcap: float) -> float:
    number = not isinstance(softcap, bool) and isinstance(softcap, (int, float))
    if not number or not (math.isfinite(softcap) and softcap > 0):
        raise InputError(f"expected softcap to be a positive, finite number, got {softcap!r}; None for no cap")
    return float(softcap)


def _check_sinks(sinks: Tensor, query: Tensor) -> None:
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        got = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise InputError(f"expected sinks to be a floating tensor of one logit for each query head, got {got}")
    if tuple(sinks.shape) != (query.shape[1],):
        raise InputError(f"expected sinks of shape (H,) = ({query.shape[1]},), got {tuple(sinks.shape)}")
    _check_device("sinks", sinks, query)


def _check_cu_seqlens(cu_seqlens: Tensor, query: Tensor, key: Tensor) -> tuple[int, ...]:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        raise MaskError("expected cu_seqlens to be a 1-D int32 tensor of boundaries, as in flash-attention")
    if query.shape[2] != key.shape[2]:
        raise MaskError(f"expected as many queries as keys with cu_seqlens, got {query.shape[2]} and {key.shape[2]}")
    bounds = bounds_of(cu_seqlens)
    batch, _, length, _ = query.shape
    ends = (bounds[0], bounds[-1]) if len(bounds) > 1 else None
    if ends != (0, batch * length) or any(a > b for a, b in pairwise(bounds)):
        end = f"{'N' if batch == 1 else 'B N'} = {batch * length}"
        raise MaskError(f"expected cu_seqlens to rise from 0 to {end}, got {list(bounds)[:20]}")
    if not set(range(0, batch * length + 1, max(1, length))) <= set(bounds):
        raise MaskError(
            f"expected cu_seqlens to have a boundary at the end of each batch row, every {length} tokens (rows are "
            f"laid end to end), got {list(bounds)[:20]}"
        )
    return bounds
