"""The masks of a transformers model as rules, without the N x N mask.

transformers asks the mask function of the chosen attention for a mask once for each kind of layer, and hands the result
to the attention function. Here the result is a `DeferredMask`: a key mask (B, Nk), offsets, and the closure
`f(b, h, q, k) -> bool` that decides the rest. `DeferredMask.plan` translates the closures that transformers itself
composes (causal, sliding windows, packed sequences) into rules that skip masked pairs; any other closure is kept and
evaluated tile by tile, which takes time N^2 but no memory.
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

# the module whose closures are translated into rules
HOME = "transformers.masking_utils"


@dataclass(frozen=True)
class MaskRules:
    """A deferred mask in the terms of `longlens.attention`, for keys `keys` of the call.

    The last query is aligned with the last of these keys (bottom-right alignment). `documents` (B, N): tokens with
    different numbers belong to different sequences, and all other rules count within a sequence.
    """

    keys: slice
    causal: bool = False
    rule: Rule | None = None
    key_mask: Tensor | None = None
    documents: Tensor | None = None
    # the rule is a closure on positions in the whole row, which cannot be split into sequences
    closure: bool = False


@dataclass
class _ClosureRules:
    """The rules of a closure. `left` (causal) and `both` are windows; `rest` are closures without a rule."""

    causal: bool = False
    left: int | None = None
    both: int | None = None
    documents: Tensor | None = None
    remapped: bool = False
    rest: list[Closure] = field(default_factory=list)


class DeferredMask(BlockMask):
    """Takes the place of a model's mask of shape (B, 1, Nq, Nk), in memory O(Nk).

    It is a `BlockMask` by type alone, because that is the only kind of mask beside a tensor that transformers passes on
    unchanged if a mask was prepared before (generation with a static cache). A model that computes with its mask raises
    `UnsupportedError`.
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
        # a static cache passes its own counter, which it advances before attention runs, so it is read now
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
        """The dtype of the mask as a tensor: bool, True = attend."""
        return torch.bool

    @property
    def device(self) -> torch.device:
        """The device of the model's hidden states."""
        return self.place

    def contiguous(self) -> DeferredMask:
        """Itself."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> DeferredMask:
        """The mask itself, since its contents are moved to the query's device when they are used."""
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
        """The same in the terms of `longlens.attention`; computed once for all layers."""
        batch, _, queries, keys = self.extent
        read = read_closure(self.closure)
        # query i is aligned with key i + shift
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
        """The key mask of keys start..stop; None if all are kept."""
        if self.key_mask is None:
            return None
        mask = self.key_mask[:, start + self.kv_offset : stop + self.kv_offset]
        # a static cache is longer than the mask: keys beyond the mask are not written yet
        mask = F.pad(mask, (0, stop - start - mask.shape[1])).expand(batch, -1)
        return None if bool(mask.all()) else mask


@torch.compiler.disable  # type: ignore[untyped-decorator]
def make_mask(**keywords: Any) -> DeferredMask:
    """transformers' mask function."""
    if "cache_position" in keywords:
        # transformers 5.0 describes the queries by their positions, later versions by length and offset
        places = keywords.pop("cache_position")
        keywords |= {"q_length": len(places), "q_offset": int(places[0])}
    return DeferredMask(**keywords)


def read_closure(closure: Closure) -> _ClosureRules:
    """The rules of a mask closure that transformers composes; parts that it does not compose stay closures."""
    return _intersection(closure, [_read(closure)])


def _read(closure: Closure) -> _ClosureRules:
    """Read one closure or a composition; `_intersection` checks the parts that have a meaning only together."""
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
    """The transformers function that made the closure, and its variables; ("", {}) for any other closure."""
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
    """The closure on positions in the call; the original counts queries and keys from the beginning of the text."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # transformers makes masks for one head and uses them for all
        h = torch.zeros_like(h[:, :1])
        q, k = q + query_lead, k + key_lead
        if not vmapped:
            return closure(b, h, q, k)
        if q.ndim != 2 or k.ndim != 2:
            raise UnsupportedError("a model's own mask function needs a method whose heads share their keys: use exact")
        return _mapped(closure)(b.flatten(), h.flatten(), q.flatten(), k.flatten())

    return allowed


def _mapped(closure: Closure) -> Closure:
    """A closure for single numbers, evaluated over all four axes."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    for axes in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        closure = torch.vmap(closure, in_dims=axes, out_dims=0)

    def over(*indices: Tensor) -> Tensor:
        with TransformGetItemToIndex():
            return closure(*indices)

    return over


def _no_tensor(does: str) -> UnsupportedError:
    return UnsupportedError(
        f"this model computes with its attention mask itself ({does}), which needs the N x N mask; longlens passes a "
        "rule instead, so this model is not supported: run it without longlens.hf.attach"
    )
