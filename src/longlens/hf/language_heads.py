"""The language model's head of a transformers model, apart from the model: logits are made a few rows at a time.

head = language_head(model)                     # checked against the model's own logits
hidden = head.hidden(ids)                       # (B, N, d), without cache and without logits
predictions(hidden[0], head.head, targets)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longlens.errors import InputError, UnsupportedError
from longlens.hf.modules import inner_models, is_transformers_model
from longlens.hf.trajectories import SERVED, head_of
from longlens.lens.predict.vocabulary import Head

# tokens on which a head is compared with the model's own logits
TRIED = 8


@dataclass(frozen=True)
class LanguageHead:
    """A model without its head (`base`), and the head; `causal`: row t predicts token t + 1, else token t."""

    base: nn.Module
    head: Head
    causal: bool

    def hidden(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        """(B, N, d): what the head takes, of token numbers (B, N); `inputs` are further inputs of the model."""
        parameters = inspect.signature(self.base.forward).parameters
        cached = {"use_cache": False} if "use_cache" in parameters else {}
        output: Any = self.base(input_ids=ids, **inputs, **cached)
        hidden: Tensor = output.last_hidden_state
        return hidden


def language_head(model: nn.Module) -> LanguageHead:
    """The head of a causal or masked language model of transformers.

    Causal: any whose output embedding is a linear layer, also with softcap (Gemma 2) or a scale (Granite, Cohere).
    Masked: those of `longlens.hf.trajectories.SERVED`. The head's logits of a few tokens are compared with the model's.

    Raises:
        InputError: not a transformers model, or one without a language model's head.
        UnsupportedError: an encoder with a decoder, or a head that longlens does not know.
    """
    whole: Any = model if is_transformers_model(model) else next(inner_models(model), None)
    if whole is None:
        raise InputError(f"expected a transformers model, got {type(model).__name__}")
    name = type(whole).__name__
    if getattr(whole.config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{name}: expected an encoder or a decoder, got an encoder with a decoder")
    kind = next((SERVED[base.__name__] for base in type(whole).__mro__ if base.__name__ in SERVED), None)
    if kind is not None and not kind.causal:
        found = LanguageHead(whole.base_model, head_of(whole, kind), causal=False)
    else:
        found = LanguageHead(whole.base_model, _causal_head(whole, name), causal=True)
    _check(whole, found)
    return found


def _causal_head(model: Any, name: str) -> Head:
    layer = model.get_output_embeddings()
    if layer is None or model.base_model is model:
        raise InputError(
            f"expected a model with a language model's head (...ForCausalLM or ...ForMaskedLM), got {name}, which has "
            "none, so it predicts no tokens; use the model that it was made from"
        )
    if not isinstance(layer, nn.Linear) or "MaskedLM" in name:
        raise UnsupportedError(f"{name}: its head is one that longlens does not know; masked ones: {_masked_names()}")
    config = model.config
    scale = getattr(config, "logit_scale", None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = 1 / config.logits_scaling
    transform = None if scale is None or scale == 1 else (lambda hidden: hidden * scale)
    return Head(layer.weight, layer.bias, transform, getattr(config, "final_logit_softcapping", None))


def _masked_names() -> str:
    return ", ".join(name for name, kind in SERVED.items() if not kind.causal)


@torch.no_grad()
def _check(model: Any, found: LanguageHead) -> None:
    """Raise `UnsupportedError` unless the head gives the model's own logits."""
    device = found.head.weight.device
    rows = len(found.head.weight)
    ids = torch.arange(TRIED, device=device).mul_(7).remainder_(rows).unsqueeze(0)
    expected = model(input_ids=ids).logits[0].float()
    got = found.head(found.hidden(ids)[0]).float()
    scale = expected.abs().amax().clamp(min=1.0)
    apart = float((got - expected).abs().amax() / scale) if got.shape == expected.shape else float("inf")
    if not apart <= 64 * torch.finfo(found.head.weight.dtype).eps:
        raise UnsupportedError(
            f"{type(model).__name__}: its own logits differ from those of its output embedding by {apart:.1g}, "
            "relatively: it computes them in a way that longlens does not know; call longlens.lens.predictions on its "
            "hidden vectors with a head of your own"
        )


def rope_warning(config: Any, tokens: int) -> str | None:
    """A sentence where the model's rotary frequencies depend on the length of the input, of `tokens` tokens; or None.

    Dynamic NTK and longrope choose frequencies by the whole input's length once it is beyond the length of training, so
    that later tokens change the predictions of early ones.
    """
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # models with several kinds of layers have one set for each
    sets = [part for part in given.values() if isinstance(part, Mapping)] or [given]
    for rope in sets:
        kind = rope.get("rope_type", rope.get("type"))
        own, more = (part.get("original_max_position_embeddings") for part in (rope, config.to_dict()))
        trained = own or more or getattr(config, "max_position_embeddings", None) or 0
        if kind in ("dynamic", "longrope") and tokens > trained:
            return (
                f"this model's rotary frequencies ({kind}) depend on the length of the input beyond {trained:,} "
                f"tokens, so text that follows changes the surprise of what comes before it; windows of one length "
                f"avoid that: --context {trained} --stride {max(1, trained // 2)}"
            )
    return None
