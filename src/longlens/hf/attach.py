"""Run a transformers model on our attention, for as long as it is attached.

The model's configuration is switched to an attention function of ours, registered together with the mask function that
tells it about padding, windows, packing and caches (without one, transformers hands over no mask at all, and says
nothing). What the model computes stays the same with method "exact", up to rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import count
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from longlens.errors import InputError, UnsupportedError
from longlens.hf.calls import Call, no_weights, read_call
from longlens.hf.masks import Carrier
from longlens.ops.attention import resolve_method
from longlens.ops.method import Method

# module, what it asked, by which method it was served, and what it got (B, H, Nq, Dv)
Observe = Callable[[nn.Module, Call, Method, Tensor], None]

# a name for each attachment, so that several can stand at once, each with its method
_numbers = count()


def attach(model: nn.Module, method: Method | str = "exact") -> Attachment:
    """Run `model`'s attention by `method`, in linear memory, until `.detach()` or the end of a `with`.

        with longlens.hf.attach(model, "window:256"):
            model(**inputs)

    Served: padding on either side, sliding windows, packed sequences (restarting `position_ids`, or `cu_seq_lens_q` and
    `cu_seq_lens_k`), dynamic and static caches, `generate`, grouped heads, capped scores, sinks, dropout, and mask
    functions of the model's own. What the model itself makes N x N stays so: T5's `position_bias`, a 4-D mask.

    Args:
        model: a transformers model whose attention goes through `AttentionInterface` (ESM, BERT, Llama, ...).
        method: as `longlens.attention` takes it.

    Raises:
        UnsupportedError: a model that has an attention of its own (Longformer, BigBird, DeBERTa, ...); later, from the
            model's forward, what cannot be served, `output_attentions=True` among it.
        InputError: not a transformers model.
    """
    return Attachment(model, method)


class Attachment:
    """A model that runs on our attention. Made by `attach`; a context manager."""

    def __init__(self, model: nn.Module, method: Method | str, observe: Observe | None = None) -> None:
        self.method = resolve_method(method)
        self.model = model
        models = list(inner_models(model))
        _check_model(model, models)
        # who watched before goes on watching
        outer = _attachment(model)
        before = () if outer is None else outer._observers
        self._observers: tuple[Observe, ...] = before if observe is None else (*before, observe)
        self._configs = _configs(models)
        self._before = [config._attn_implementation_internal for config in self._configs]
        self._name = f"longlens_{next(_numbers)}"
        self._modules = WeakSet(attention_modules(model).values())
        self._hooks: list[Any] = []
        self._attached = True
        try:
            self._switch(models)
        except BaseException:
            self.detach()
            raise

    def _switch(self, models: list[Any]) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(self._name, self._attend)
        AttentionMaskInterface.register(self._name, _make_mask)
        for config in self._configs:
            # the attribute itself: the setter would reach into further configurations
            config._attn_implementation_internal = self._name
        self._hooks = [inner.register_forward_pre_hook(_refuse_weights, with_kwargs=True) for inner in models]

    def detach(self) -> None:
        """Put the model back as it was. A second call does nothing."""
        if not self._attached:
            return
        held = [config._attn_implementation_internal for config in self._configs]
        if any(name != self._name and name != before for name, before in zip(held, self._before, strict=True)):
            raise InputError("expected the last attachment of a model to be detached first")
        from transformers import AttentionInterface, AttentionMaskInterface

        for config, before in zip(self._configs, self._before, strict=True):
            config._attn_implementation_internal = before
        for hook in self._hooks:
            hook.remove()
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(self._name, None)
        self._attached = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Carrier | Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **given: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention function: (B, H, N, D) in, (B, Nq, H, Dv) out, and no weights."""
        if module not in self._modules:
            raise UnsupportedError(
                f"{type(module).__name__}: this is not part of the attached {type(self.model).__name__}, but of "
                "another model that was built from the same configuration object and so was switched with it; build "
                "each from a copy of its own (copy.deepcopy(config))"
            )
        call = read_call(module, query, key, value, attention_mask, dropout, scaling, given)
        output = call.attend(self.method)
        for observe in self._observers:
            observe(module, call, self.method, output)
        return output.transpose(1, 2).contiguous(), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _make_mask(**given: Any) -> Carrier:
    """transformers' mask function."""
    if "cache_position" in given:
        # transformers 5.0 says where the queries stand by their positions, later ones by length and offset
        places = given.pop("cache_position")
        given |= {"q_length": len(places), "q_offset": int(places[0])}
    return Carrier(**given)


def _refuse_weights(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    # transformers would return an empty tuple
    if given.get("output_attentions"):
        raise no_weights(type(module).__name__)


def attached_method(model: Any) -> Method | None:
    """The method that a transformers model is attached to at present; None where it is not."""
    attachment = _attachment(model)
    return None if attachment is None else attachment.method


def _attachment(model: Any) -> Attachment | None:
    from transformers import AttentionInterface

    function = AttentionInterface._global_mapping.get(model.config._attn_implementation)
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, Attachment) else None


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name and module of every attention that goes through transformers' interface, in the order of the modules."""
    return {
        name: module
        for name, module in model.named_modules()
        if not is_transformers_model(module) and _asks_interface(type(module))
    }


def _asks_interface(kind: type) -> bool:
    for base in kind.__mro__:
        for function in vars(base).values():
            code = getattr(inspect.unwrap(function), "__code__", None) if inspect.isfunction(function) else None
            if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
                return True
    return False


def is_transformers_model(model: object) -> bool:
    """Whether `model` is one of transformers' models, asked without importing transformers."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.partition(".")[0] == "transformers"
        for base in type(model).__mro__
    )


def inner_models(model: nn.Module) -> Iterator[Any]:
    """`model` and every transformers model inside it."""
    return (module for module in model.modules() if is_transformers_model(module))


def _check_model(model: nn.Module, models: list[Any]) -> None:
    if not models or models[0] is not model:
        raise InputError(f"expected a transformers model, got {type(model).__name__}")
    without = {type(inner).__name__: None for inner in models if not inner._can_set_attn_implementation()}
    if without or not attention_modules(model):
        names = ", ".join(without) or type(model).__name__
        raise UnsupportedError(
            f"{names}: its attention does not go through transformers' AttentionInterface (it has code of its own, as "
            "Longformer, BigBird, Reformer and DeBERTa have), so no other attention can be put in its place"
        )
    for inner in models:
        if getattr(inner.config, "output_attentions", False):
            raise no_weights(type(inner).__name__)


def _configs(models: list[Any]) -> list[Any]:
    """The configurations of all models, sub-configurations too, each once."""
    found: dict[int, Any] = {}
    todo = [inner.config for inner in models]
    while todo:
        config = todo.pop()
        if id(config) in found:
            continue
        found[id(config)] = config
        parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
        todo.extend(part for part in parts if part is not None)
    return list(found.values())
