"""The logit lens (`longlens.lens.predict.logit_lens`) for language models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longlens.errors import InputError, LensError, UnsupportedError
from longlens.hf.modules import inner_models, is_transformers_model
from longlens.lens.predict.logit_lens import Reading, Trajectories, TrajectoryObserver
from longlens.lens.predict.vocabulary import Head
from longlens.ops.observe import Observer


@dataclass(frozen=True)
class ModelParts:
    """Names of a model's parts: the list of layers, the norm after them (None: each layer ends with its own), the head;
    `causal` models can compute the logits of the last token alone."""

    layers: str
    norm: str | None
    head: str
    causal: bool


_LLAMA = ModelParts("model.layers", "model.norm", "lm_head", causal=True)
_ROBERTA = ModelParts("roberta.encoder.layer", None, "lm_head", causal=False)
SERVED: Mapping[str, ModelParts] = MappingProxyType({
    "BertForMaskedLM": ModelParts("bert.encoder.layer", None, "cls.predictions", causal=False),
    "EsmForMaskedLM": ModelParts("esm.encoder.layer", "esm.encoder.emb_layer_norm_after", "lm_head", causal=False),
    "GPT2LMHeadModel": ModelParts("transformer.h", "transformer.ln_f", "lm_head", causal=True),
    "Gemma2ForCausalLM": _LLAMA,
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "RobertaForMaskedLM": _ROBERTA,
    "XLMRobertaForMaskedLM": _ROBERTA,
})  # fmt: skip


def trajectories_transformers(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor | None,
    *,
    top: int,
    layers: Collection[int] | None,
    chunk: int | None,
) -> Trajectories:
    """`longlens.trajectories` for a transformers model; arguments as there.

    Attention is the model's own; inside `longlens.hf.attach(model)` it is linear in memory. The prediction of the last
    layer is compared with the model's own output at the last position.

    Raises:
        UnsupportedError: a model whose norm and head longlens does not know.
        LensError: the norm and head do not give the model's own output.
    """
    model = _language_model(model)
    anatomy = _anatomy(model)
    ids, rows = _tokens(inputs)
    if targets is not None and targets.shape != ids.shape:
        raise InputError(f"expected targets {tuple(ids.shape)} as input_ids, got {tuple(targets.shape)}")
    blocks = list(model.get_submodule(anatomy.layers).children())
    norm = None if anatomy.norm is None else model.get_submodule(anatomy.norm)
    head = head_of(model, anatomy)
    flat_targets = None if targets is None else targets.flatten()[rows]
    positions = torch.stack([rows // ids.shape[1], rows % ids.shape[1]], 1)
    reading = Reading(head, flat_targets, positions, top, chunk, rows)
    observer = TrajectoryObserver(reading, norm, len(blocks), layers)
    last: list[Tensor] = []

    def keep_last(module: nn.Module, args: Any, output: Any) -> None:
        last.append(_stream(output)[:, -1].clone())

    hook = blocks[-1].register_forward_hook(keep_last)
    try:
        with torch.no_grad(), _observed_stream(blocks, observer):
            model_output = _run(model, inputs, anatomy)
            stream = last[-1] if norm is None else norm(last[-1])
            _check(type(model).__name__, head(stream) if anatomy.causal else stream, model_output)
    finally:
        hook.remove()
    return observer.trajectories()


@contextmanager
def _observed_stream(blocks: list[nn.Module], observer: Observer) -> Iterator[None]:
    """One forward pass: send `observer` the residual stream before the first of `blocks`, and after each."""
    forward = observer.begin()

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        forward.passed(0, args[0] if args else keywords["hidden_states"])

    def after(number: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: forward.passed(number, _stream(output))

    hooks = [block.register_forward_hook(after(number)) for number, block in enumerate(blocks, 1)]
    hooks.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
        forward.ended()
    finally:
        for hook in hooks:
            hook.remove()


def _stream(output: Any) -> Tensor:
    """A layer's output, without the further values that some versions return."""
    return output if isinstance(output, Tensor) else output[0]


def _language_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a wrapper such as a `PeftModel`."""
    return model if is_transformers_model(model) else next(inner_models(model), model)


def _anatomy(model: nn.Module) -> ModelParts:
    for base in type(model).__mro__:
        if base.__name__ in SERVED and base.__module__.partition(".")[0] == "transformers":
            return SERVED[base.__name__]
    raise UnsupportedError(
        f"expected one of {', '.join(SERVED)}, got {type(model).__name__}, whose last norm and head longlens does "
        "not know; for such a model call longlens.lens.predictions on its hidden vectors"
    )


def _tokens(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`input_ids` (B, N), and the positions in the flattened batch that are not padding."""
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), Tensor):
        raise InputError(f"expected a mapping of the model's inputs with input_ids, got {type(inputs)}")
    if "labels" in inputs:
        raise InputError("expected inputs without labels, whose loss would need all logits; give targets= instead")
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return ids, torch.arange(ids.numel(), device=ids.device)
    if mask.shape != ids.shape:
        raise InputError(f"expected attention_mask {tuple(ids.shape)} as input_ids, got {tuple(mask.shape)}")
    return ids, mask.flatten().nonzero().squeeze(1)


def head_of(model: nn.Module, anatomy: ModelParts) -> Head:
    """The head as a product with the vocabulary and the layers before it."""
    module: Any = model.get_submodule(anatomy.head)
    if isinstance(module, nn.Linear):
        config: Any = model.config
        return Head(module.weight, module.bias, softcap=getattr(config, "final_logit_softcapping", None))
    # ESM adds a separate bias; in the other models the bias is tied to the decoder's
    bias = module.bias if module.decoder.bias is None else module.decoder.bias
    head = Head(module.decoder.weight, bias, _transform(module))
    sample = torch.linspace(-1, 1, head.weight.shape[1], dtype=head.weight.dtype, device=head.weight.device)[None]
    with torch.no_grad():
        _check(type(model).__name__, head(sample), module(sample))
    return head


def _transform(module: Any) -> Callable[[Tensor], Tensor]:
    if hasattr(module, "transform"):
        return module.transform
    return lambda hidden: module.layer_norm(F.gelu(module.dense(hidden)))


def _run(model: nn.Module, inputs: Mapping[str, Any], anatomy: ModelParts) -> Tensor:
    """Run the model without the logits of all tokens: returns its logits (causal) or vectors at the last position."""
    if anatomy.causal:
        return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    inner: Any = model.base_model
    return inner(**inputs).last_hidden_state[:, -1]


def _check(name: str, got: Tensor, expected: Tensor) -> None:
    """Raise `LensError` unless both are equal up to rounding."""
    scale = expected.abs().amax().clamp(min=1.0)
    tolerance = 64 * torch.finfo(expected.dtype).eps
    if not torch.allclose(got / scale, expected / scale, rtol=0, atol=tolerance, equal_nan=True):
        raise LensError(
            f"{name}: expected the norm and head to give the model's own output, got values that differ by up to "
            f"{float((got - expected).abs().amax()):.2g}; the class of the model was changed, or this version of "
            "transformers computes them differently: call longlens.lens.predictions on its hidden vectors instead"
        )
