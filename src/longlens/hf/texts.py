"""Texts for a transformers model: the model and its tokenizer from a folder or the hub, and the tokens of a text."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from longlens.errors import CheckpointError, InputError, UnsupportedError
from longlens.hf.modules import attention_modules
from longlens.hf.trajectories import SERVED, trajectories_transformers
from longlens.lens.predict.vocabulary import NO_TARGET, Predictions
from longlens.models.pretrained import choose_device, choose_dtype

# the class that loads a model, by the end of the class name in the configuration
_CLASSES = {
    "ForMaskedLM": "AutoModelForMaskedLM", "ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM",
}  # fmt: skip


@dataclass(frozen=True)
class TokenizedText:
    """A text as input of the model: `inputs` (1, N), each token's label, and whether it is special."""

    inputs: dict[str, Tensor]
    labels: tuple[str, ...]
    special: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TextModel:
    """A transformers model with its tokenizer; `longest` is the most tokens that it has positions for."""

    model: nn.Module
    tokenizer: Any
    name: str
    longest: int | None

    @property
    def layers(self) -> int:
        """The number of attention layers."""
        return len(attention_modules(self.model))

    @property
    def heads(self) -> int:
        """The number of query heads in each layer."""
        config: Any = self.model.config
        return config.num_attention_heads

    @property
    def predicts(self) -> bool:
        """Whether the model has a language model's head that longlens knows, so that surprise can be computed."""
        return any(base.__name__ in SERVED for base in type(self.model).__mro__)

    def tokenize(self, text: str, place: str) -> TokenizedText:
        """The text as one sequence. Raises `InputError` if it is empty or longer than the model's positions."""
        encoded = self.tokenizer(text, truncation=False, padding=False, return_special_tokens_mask=True, verbose=False)
        numbers = encoded["input_ids"]
        special = tuple(map(bool, encoded["special_tokens_mask"]))
        if all(special):
            raise InputError(f"{place}: expected a text, got none")
        if self.longest is not None and len(numbers) > self.longest:
            raise InputError(
                f"{place}: expected at most {self.longest:,} tokens, as many as {self.name} has positions, got "
                f"{len(numbers):,}; give a part of the text, or a model with more positions"
            )
        # one at a time, since joined tokens lose the marks of a word's beginning and middle
        labels = tuple(self.tokenizer.decode([number], clean_up_tokenization_spaces=False) for number in numbers)
        device = next(self.model.parameters()).device
        inputs = {
            name: torch.tensor([encoded[name]], device=device)
            for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded
        }  # fmt: skip
        return TokenizedText(inputs, labels, special)

    def read(self, text: TokenizedText, *, predict: bool) -> Predictions | None:
        """Run the model once; with `predict` (if it `predicts`), return what its head predicts for each token.

        A masked model sees the token that it predicts; a causal one predicts it from those before, so the first token
        has no surprise. In both, row t belongs to token t.
        """
        with torch.no_grad():
            if not predict:
                # a cache would hold the keys and values of all layers
                cached = "use_cache" in inspect.signature(self.model.forward).parameters
                self.model(**text.inputs, **({"use_cache": False} if cached else {}))
                return None
            ids = text.inputs["input_ids"]
            kind = next(SERVED[base.__name__] for base in type(self.model).__mro__ if base.__name__ in SERVED)
            targets = ids.clone()
            if kind.causal:
                targets[:, :-1], targets[:, -1] = ids[:, 1:], NO_TARGET
            inputs = {
                name: tensor for name, tensor in text.inputs.items() if name != "token_type_ids" or not kind.causal
            }
            path = trajectories_transformers(self.model, inputs, targets, top=0, layers=[-1], chunk=None)
            predictions = next(iter(path.results.values()))
            return _shifted(predictions) if kind.causal else predictions


def _shifted(predictions: Predictions) -> Predictions:
    """Each row moved to the token that it predicts."""
    surprise, rank, entropy = predictions.surprise, predictions.rank, predictions.entropy
    assert surprise is not None
    assert rank is not None
    nothing = entropy.new_full((1,), torch.nan)
    return Predictions(
        predictions.name, torch.cat([nothing, entropy[:-1]]), predictions.top, predictions.top_log_probability,
        surprise=torch.cat([nothing, surprise[:-1]]), rank=torch.cat([rank.new_zeros(1), rank[:-1]]),
    )  # fmt: skip


def load_text_model(name: str, *, dtype: str = "auto", device: str = "auto") -> TextModel:
    """A transformers model of text and its tokenizer, from a folder or the Hugging Face hub.

    Raises:
        CheckpointError: transformers is not installed, there is no such model, its weights or tokenizer do not fit.
        UnsupportedError: an encoder with a decoder, or an attention that cannot be watched.
    """
    if importlib.util.find_spec("transformers") is None:
        raise CheckpointError("a model of text needs transformers, which is not installed; pip install 'longlens[hf]'")
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    chosen = choose_device(device)
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1):
        raise CheckpointError(
            f"expected a transformers folder, or a name on the Hugging Face hub, found no folder of the name {name!r}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        # a folder without the files of a tokenizer makes transformers raise a TypeError
        raise CheckpointError(
            f"expected a transformers folder, or a name on the Hugging Face hub, with a configuration and a tokenizer, "
            f"got {name!r}: {error}"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{name}: expected an encoder or a decoder, got an encoder-decoder; call longlens.watch in Python"
        )
    architecture = (getattr(config, "architectures", None) or [""])[0]
    kind = next((kind for end, kind in _CLASSES.items() if architecture.endswith(end)), "AutoModel")
    try:
        with _quiet_in_a_pipe():
            model, loading = getattr(transformers, kind).from_pretrained(
                name, dtype=choose_dtype(dtype, chosen), output_loading_info=True
            )
    except (SafetensorError, UnpicklingError, EOFError) as error:
        # PyTorch's own words on a pickle are long, and advise to load it unsafely
        reason = f" ({error})" if isinstance(error, SafetensorError) else ""
        raise CheckpointError(
            f"{name}: expected a file of weights, got one that is cut off or of another kind{reason}; fetch it again"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name}: its weights cannot be read ({error})") from error
    # a pooler follows all attention layers, and not every checkpoint has one
    missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
    if missing:
        raise CheckpointError(f"{name}: expected all weights of {type(model).__name__}, found none for {missing[:5]}")
    model = model.to(chosen).eval().requires_grad_(False)
    if not attention_modules(model):
        raise UnsupportedError(
            f"{name}: {type(model).__name__} has its own attention code, which cannot be watched; use another model"
        )
    return TextModel(model, tokenizer, name, _longest(model))


def _longest(model: Any) -> int | None:
    most = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and related models number positions from after the padding token
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    return most


@contextmanager
def _quiet_in_a_pipe() -> Iterator[None]:
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
