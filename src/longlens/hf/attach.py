"""Run a transformers model on longlens' attention, for as long as it is attached.

The model's configuration is switched to an attention function that is registered together with a mask function; the
latter describes padding, windows, packing and caches (without one, transformers silently passes no mask at all). With
method "exact" the model computes the same as before, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from types import TracebackType
from typing import Any, Self
from weakref import WeakMethod, WeakSet, finalize

import torch
from torch import Tensor, nn

from longlens.errors import InputError, UnsupportedError
from longlens.hf.arguments import no_weights, read_arguments
from longlens.hf.copies import AttachedName, ForwardHook
from longlens.hf.feed_forward import FeedForwardChunks
from longlens.hf.masks import DeferredMask, make_mask
from longlens.hf.modules import attention_modules, inner_models
from longlens.hf.subscription import Subscription
from longlens.ops.method import Method
from longlens.ops.observe import keep_in_graph
from longlens.ops.registry import resolve_method

# a name for each attachment, so that several can exist at once, each with its method
_numbers = count()


def attach(model: nn.Module, method: Method | str = "exact", *, mlp_chunk: int | None = None) -> Attachment:
    """Run `model`'s attention by `method`, in linear memory, until `.detach()` or the end of a `with`.

        with longlens.hf.attach(model, "window:256"):
            model(**inputs)

    Supported are padding on either side, sliding windows, packed sequences (restarting `position_ids`, or
    `cu_seq_lens_q` and `cu_seq_lens_k`), dynamic and static caches, `generate`, grouped heads, capped scores, sinks,
    dropout, and the model's own mask functions. N x N tensors that the model itself makes stay N x N: T5's
    `position_bias`, or a 4-D mask.

    A copy of an attached model is not attached. `model.set_attn_implementation(...)` switches to another attention,
    which stays after `.detach()`.

    Args:
        model: a transformers model whose attention goes through `AttentionInterface` (ESM, BERT, Llama, ...), or a
            module that holds some (a `PeftModel`).
        method: as `longlens.attention` takes it.
        mlp_chunk: also run feed-forward parts that compute each token by itself on so many tokens at a time, so that
            their wide layers are not held for all tokens (`longlens.hf.feed_forward`); without gradients only. None:
            run them as the model does.

    Raises:
        UnsupportedError: a model with its own attention code (Longformer, BigBird, DeBERTa, ...); later, from the
            model's forward, arguments that are not supported, such as `output_attentions=True`.
        InputError: the model is not one of transformers.
    """
    return Attachment(model, method, mlp_chunk=mlp_chunk)


class Attachment:
    """A model that runs on longlens' attention. Made by `attach`; a context manager."""

    def __init__(
        self,
        model: nn.Module,
        method: Method | str,
        observed: Sequence[Subscription] = (),
        mlp_chunk: int | None = None,
    ) -> None:
        self.method = resolve_method(method)
        models = list(inner_models(model))
        _check_model(model, models)
        self._chunks = None if mlp_chunk is None else FeedForwardChunks(model, mlp_chunk)
        # observers of the attachment before stay subscribed
        outer: Attachment | None = attachment_of(model)
        self._subscriptions: tuple[Subscription, ...] = (*(() if outer is None else outer._subscriptions), *observed)
        self._kind = type(models[0]).__name__
        self._modules = WeakSet(attention_modules(model).values())
        self._name = f"longlens_{next(_numbers)}"
        self._configs = _configs(models)
        self._hooks: list[Any] = []
        self.attached = True
        # (B, Nk) bool: keys that queries see; all others are hidden in every layer. None: all are seen
        self.keep: Tensor | None = None
        # for a model that is dropped, together with its attachment, without having been detached
        self._forget = finalize(self, _forget, self._name, self._configs)
        self._forget.atexit = False
        try:
            self._switch(models)
        except BaseException:
            self._undo()
            raise

    def _switch(self, models: list[Any]) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        # a weak reference, so that transformers' registry does not keep the model alive
        attend: WeakMethod[Any] = WeakMethod(self._attend)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def registered(*args: Any, **keywords: Any) -> tuple[Tensor, None]:
            attend_or_none = attend()
            assert attend_or_none is not None
            return attend_or_none(*args, **keywords)

        AttentionInterface.register(self._name, registered)
        AttentionMaskInterface.register(self._name, make_mask)
        for config in self._configs:
            # set the attribute itself, because the setter would change further configurations
            before = config._attn_implementation_internal
            config._attn_implementation_internal = AttachedName(self._name, before, self)
        # the hooks keep the attachment alive for as long as the model exists
        hook = ForwardHook(self._refuse_weights)
        self._hooks = [inner.register_forward_pre_hook(hook, with_kwargs=True) for inner in models]
        if self._chunks is not None:
            self._chunks.start()

    def detach(self) -> None:
        """Restore the attention that the model had, unless `set_attn_implementation` changed it. May be repeated."""
        if not self.attached:
            return
        names = [config._attn_implementation_internal for config in self._configs]
        if any(isinstance(name, AttachedName) and name != self._name for name in names):
            raise InputError("expected the last attachment of a model to be detached first")
        self._undo()

    def _undo(self) -> None:
        self.attached = False
        for hook in self._hooks:
            hook.remove()
        if self._chunks is not None:
            self._chunks.stop()
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: DeferredMask | Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention function: (B, H, N, D) in, (B, Nq, H, Dv) out, and no weights."""
        if module not in self._modules:
            raise UnsupportedError(
                f"{type(module).__name__}: expected a part of the attached {self._kind}, got a part of another model "
                "that was built from the same configuration object and so was switched with it; build each model "
                "from its own copy (copy.deepcopy(config))"
            )
        arguments = read_arguments(module, query, key, value, attention_mask, dropout, scaling, keywords)
        if self.keep is not None:
            arguments = arguments.seeing(self.keep)
        output = arguments.attend(self.method)
        keep_in_graph([subscription.observer for subscription in self._subscriptions], output)
        for subscription in self._subscriptions:
            subscription.attended(module, arguments, self.method, output)
        return output.transpose(1, 2).contiguous(), None

    def _refuse_weights(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        # transformers would return an empty tuple
        if keywords.get("output_attentions") and attachment_of(module) is not None:
            raise no_weights(type(module).__name__)


def _forget(name: str, configs: list[Any]) -> None:
    """Remove an attachment from transformers' registries and from the configurations that still name it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for config in configs:
        current = config._attn_implementation_internal
        if isinstance(current, AttachedName) and current == name:
            config._attn_implementation_internal = current.restored()
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


def attached_method(model: nn.Module) -> Method | None:
    """The method that a transformers model is attached to at present; None if it is not attached."""
    attachment = attachment_of(model)
    return None if attachment is None else attachment.method


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment that the model runs on at present, the last of several; None if there is none."""
    inner: Any = next(inner_models(model), None)
    name = None if inner is None else inner.config._attn_implementation_internal
    return name.attachment() if isinstance(name, AttachedName) else None


def _check_model(model: nn.Module, models: list[Any]) -> None:
    if not models:
        raise InputError(f"expected a transformers model, got {type(model).__name__}")
    without = {type(inner).__name__: None for inner in models if not inner._can_set_attn_implementation()}
    if without or not attention_modules(model):
        names = ", ".join(without) or type(model).__name__
        raise UnsupportedError(
            f"{names}: its attention does not use transformers' AttentionInterface (it has its own code, as Longformer "
            "and DeBERTa have), so it cannot be replaced; use a model that supports attn_implementation"
        )
    for inner in models:
        if getattr(inner.config, "output_attentions", False):
            raise no_weights(type(inner).__name__)


def _configs(models: list[Any]) -> list[Any]:
    """The configurations of all models, including sub-configurations, each once."""
    return list({id(config): config for config in _walk_configs(models)}.values())


def _walk_configs(models: list[Any]) -> Iterator[Any]:
    pending, visited = [inner.config for inner in models], set[int]()
    while pending:
        config = pending.pop()
        if id(config) in visited:
            continue
        visited.add(id(config))
        yield config
        parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
        pending.extend(part for part in parts if part is not None)
