"""What a transformers model says about who may attend to whom, without the N x N mask.

transformers asks the mask function of the chosen attention for a mask once per kind of layer, and hands whatever it
gets to the attention function. Ours gets a `DeferredMask`: a key mask (B, Nk), offsets, and the closure
`f(b, h, q, k) -> bool` that says the rest. `DeferredMask.plan` reads the closures that transformers itself composes
(causal, sliding windows, packed sequences) as rules that skip what is masked; any other closure is kept and evaluated
tile by tile, which costs time N^2 but no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from longlens.errors import MaskError, UnsupportedError
from longlens.ops.masks import Predicate, Rule
from longlens.ops.sparse.window import Window

Closure = Callable[[Any, Any, Any, Any], Any]

# the module whose closures we know how to read
HOME = "transformers.masking_utils"


@dataclass(frozen=True)
class MaskRules:
    """A deferred mask in the terms of `longlens.attention`, for keys `keys` of the call.

    The last query stands at the last of these keys (bottom-right alignment). `documents` (B, N): tokens with different
    numbers lie in different sequences, and all other rules count within a sequence.
    """

    keys: slice
    causal: bool = False
    rule: Rule | None = None
    key_mask: Tensor | None = None
    documents: Tensor | None = None
    # the rule is a closure on positions in the whole, which cannot be cut at sequences
    closure: bool = False


@dataclass
class _ClosureRules:
    """What was read from a closure. `left` (causal) and `both` are windows; `rest` could not be read."""

    causal: bool = False
    left: int | None = None
    both: int | None = None
    documents: Tensor | None = None
    remapped: bool = False
    rest: list[Closure] = field(default_factory=list)


class DeferredMask(BlockMask):
    """Stands where a model keeps its mask of shape (B, 1, Nq, Nk), and holds O(Nk).

    A `BlockMask` by type alone: that is the one kind of mask beside a tensor which transformers passes on untouched
    where a mask was prepared before (generation with a static cache). A model that computes with its mask is refused.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        mask_function: Closure,
        attention_mask: Tensor | None = None,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        **_: Any,
    ) -> None:
        self.extent = (int(batch_size), 1, int(q_length), int(kv_length))
        # a static cache hands out its own counter, which it advances before attention runs: read it now
        self.q_offset, self.kv_offset = int(q_offset), int(kv_offset)
        self.closure = mask_function
        self.vmapped = use_vmap
        self.key_mask = attention_mask
        self.place = torch.device(device)
        if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.dtype != torch.bool):
            raise MaskError(
                f"expected transformers to hand over a bool key mask (B, Nk), got {attention_mask.dtype} "
                f"{tuple(attention_mask.shape)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, 1, Nq, Nk)."""
        return self.extent

    @property
    def ndim(self) -> int:
        """4."""
        return 4

    @property
    def dtype(self) -> torch.dtype:
        """Bool, True = attend, were it a tensor."""
        return torch.bool

    @property
    def device(self) -> torch.device:
        """Where the model's hidden states are."""
        return self.place

    def contiguous(self) -> DeferredMask:
        """Itself."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> DeferredMask:
        """Itself: what it holds follows the query's device when it is used."""
        return self

    def __repr__(self) -> str:
        return f"DeferredMask(shape={self.extent}, q_offset={self.q_offset}, kv_offset={self.kv_offset})"

    __str__ = __repr__

    def __getitem__(self, index: Any) -> DeferredMask:
        raise _no_tensor("indexes it")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise _no_tensor(f"asks for its '{name}'")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _no_tensor(f"calls {getattr(function, '__name__', function)} on it")

    @cached_property
    def plan(self) -> MaskRules:
        """The same in the terms of `longlens.attention`; worked out once for all layers."""
        batch, _, queries, keys = self.extent
        read = read_closure(self.closure)
        # query i stands at key i + shift
        shift = self.q_offset - self.kv_offset
        start, stop = 0, keys
        if read.causal and 0 <= shift + queries <= keys:
            # keys of a static cache that are not written yet
            stop = shift + queries
        structured = read.causal or read.both is not None or read.documents is not None
        square = queries == keys and shift == 0
        if (structured and stop - queries != shift) or (read.documents is not None and (read.rest or not square)):
            read = _ClosureRules(rest=[self.closure])
            stop = keys
        rules: list[Rule] = []
        if read.left is not None:
            start = max(0, shift - read.left)
            if read.left < stop - start - 1 and queries > 1:
                rules.append(Window(read.left, 0))
        if read.both is not None and read.both < stop - 1:
            rules.append(Window(read.both))
        for closure in read.rest:
            lead = self.q_offset - (stop - start - queries), start + self.kv_offset
            rules.append(Predicate(_positioned(closure, *lead, self.vmapped)))
        rule = None
        for more in rules:
            rule = more if rule is None else rule & more
        return MaskRules(
            slice(start, stop),
            causal=read.causal,
            rule=rule,
            key_mask=self._kept(batch, start, stop),
            documents=read.documents,
            closure=bool(read.rest),
        )

    def _kept(self, batch: int, start: int, stop: int) -> Tensor | None:
        """The key mask of keys start..stop; None where all are kept."""
        if self.key_mask is None:
            return None
        mask = self.key_mask[:, start + self.kv_offset : stop + self.kv_offset]
        # a static cache is longer than the mask: what the mask does not reach is not there yet
        mask = F.pad(mask, (0, stop - start - mask.shape[1])).expand(batch, -1)
        return None if bool(mask.all()) else mask


def read_closure(closure: Closure) -> _ClosureRules:
    """What a mask closure means, as far as it is one of those that transformers composes; the rest as closures."""
    return _intersection(closure, [_read(closure)])


def _read(closure: Closure) -> _ClosureRules:
    """One closure, or a composition; parts that mean something only together are checked by `_intersection`."""
    name, variables = _known(closure)
    if name == "causal_mask_function":
        return _ClosureRules(causal=True)
    if name == "bidirectional_mask_function":
        return _ClosureRules()
    if name == "sliding_window_overlay":
        return _ClosureRules(left=int(variables["sliding_window"]) - 1)
    if name == "sliding_window_bidirectional_overlay":
        return _ClosureRules(both=int(variables["sliding_window"]))
    if name == "packed_sequence_mask_function":
        return _ClosureRules(documents=variables["packed_sequence_mask"])
    if name == "remap_positions_for_packed_sequence":
        # positions rise by 1 within a sequence, so rules on distances stay what they are
        inner = read_closure(variables["mask_function"])
        if inner.rest:
            return _ClosureRules(rest=[closure])
        inner.remapped = True
        return inner
    if name == "and_masks":
        return _intersection(closure, [_read(member) for member in variables["mask_functions"]])
    return _ClosureRules(rest=[closure])


def _known(closure: Closure) -> tuple[str, dict[str, Any]]:
    """The transformers function that made the closure, and what it holds; ("", {}) for any other."""
    code = getattr(closure, "__code__", None)
    if code is None or getattr(closure, "__module__", None) != HOME:
        return "", {}
    cells = getattr(closure, "__closure__", None) or ()
    variables = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    return closure.__qualname__.partition(".")[0], variables


def _intersection(closure: Closure, members: list[_ClosureRules]) -> _ClosureRules:
    both = [member.both for member in members if member.both is not None]
    left = [member.left for member in members if member.left is not None]
    documents = [member.documents for member in members if member.documents is not None]
    causal = any(member.causal for member in members)
    remapped = any(member.remapped for member in members)
    # a one-sided window is read together with causality, remapped positions together with their sequences, and there
    # is one set of sequences
    if (left and not causal) or remapped != bool(documents) or len(documents) > 1:
        return _ClosureRules(rest=[closure])
    return _ClosureRules(
        causal=causal,
        left=min(left) if left else None,
        both=min(both) if both else None,
        documents=documents[0] if documents else None,
        remapped=remapped,
        rest=[rest for member in members for rest in member.rest],
    )


def _positioned(closure: Closure, query_lead: int, key_lead: int, vmapped: bool) -> Closure:
    """The closure on our positions: it counts queries and keys from the beginning of the text."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # masks are made for one head and used for all
        h = torch.zeros_like(h[:, :1])
        q, k = q + query_lead, k + key_lead
        if not vmapped:
            return closure(b, h, q, k)
        if q.ndim != 2 or k.ndim != 2:
            raise UnsupportedError(
                "a model's own mask function is served by methods whose heads share their keys: exact"
            )
        return _mapped(closure)(b.flatten(), h.flatten(), q.flatten(), k.flatten())

    return allowed


def _mapped(closure: Closure) -> Closure:
    """A closure that is written for single numbers, over all four axes."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    for axes in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        closure = torch.vmap(closure, in_dims=axes, out_dims=0)

    def over(*indices: Tensor) -> Tensor:
        with TransformGetItemToIndex():
            return closure(*indices)

    return over


def _no_tensor(does: str) -> UnsupportedError:
    return UnsupportedError(
        f"this model computes with its attention mask itself ({does}), which needs the N x N mask; longlens hands over "
        "a rule instead and cannot serve it"
    )
