"""AMPLIFY (Fournier et al. 2024, doi 10.1101/2024.09.23.614603): RMSNorm, SwiGLU, no biases, an untied head.

Its rotary positions turn neighbouring pairs (2i, 2i + 1); rows of the query and key matrices are put in the order of
the half-split form (i, i + D/2) when they are read, which leaves every score as it is. Its own code computes angles for
2,048 positions; here there is no limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from longlens.errors import CheckpointError
from longlens.io.alphabet import Alphabet
from longlens.models.config import EncoderConfig
from longlens.models.families.entries import ConfigEntries, check_heads
from longlens.models.families.family import Family, Known, read_vocabulary
from longlens.models.families.names import TensorNames
from longlens.models.parts.feed_forward import FeedForward
from longlens.models.parts.head import Head
from longlens.models.parts.norm import Norm
from longlens.models.parts.projections import Projections

_SPECIAL = ("<pad>", "<unk>", "<mask>", "<bos>", "<eos>", "|")
_RESIDUES = tuple("LAGVSERTIDPKQNFYMHWC")
# of the published weights, and of the repository's later configuration
_VOCABULARIES = {27: (*_SPECIAL, *_RESIDUES, "B"), 32: (*_SPECIAL, *"XBOUZJ", *_RESIDUES)}


def _half_split(name: str, tensor: Tensor, config: EncoderConfig) -> Tensor:
    """Rows of queries and keys in the order that half-split rotation takes."""
    if not name.endswith((".q.weight", ".k.weight")):
        return tensor
    # (heads, D / 2, 2, d): the pair becomes the outer axis
    pairs = tensor.view(config.heads, config.head_width // 2, 2, tensor.shape[1])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _neighbours(name: str, tensor: Tensor, config: EncoderConfig) -> Tensor:
    """The inverse of `_half_split`."""
    if not name.endswith((".q.weight", ".k.weight")):
        return tensor
    halves = tensor.view(config.heads, 2, config.head_width // 2, tensor.shape[1])
    return halves.transpose(1, 2).reshape(tensor.shape)


_NAMES = TensorNames(
    embedding="encoder.weight",
    norm="layer_norm_2",
    layer={
        "attention_norm": "transformer_encoder.{i}.attention_norm",
        "qkv": tuple(f"transformer_encoder.{{i}}.{part}" for part in "qkv"),
        "out": "transformer_encoder.{i}.wo",
        "feed_norm": "transformer_encoder.{i}.ffn_norm",
        "up": "transformer_encoder.{i}.ffn.w12",
        "down": "transformer_encoder.{i}.ffn.w3",
    },
    head={"decoder": "decoder.weight", "bias": "decoder.bias"},
    reorder=_half_split,
    restore=_neighbours,
)


def _config(settings: ConfigEntries) -> EncoderConfig:
    entries = settings.entries
    settings.refuse("AMPLIFY", {
        "hidden_act": (str(entries.get("hidden_act", "SwiGLU")).lower() != "swiglu", "a model with another activation"),
        "rms_norm": (entries.get("rms_norm", True) is not True, "a model with LayerNorm"),
        "att_bias": (bool(entries.get("att_bias")), "a model with biases"),
        "ffn_bias": (bool(entries.get("ffn_bias")), "a model with biases"),
        "layer_norm_after_embedding": (bool(entries.get("layer_norm_after_embedding")), "a model with another norm"),
        "layer_norm_before_last_layer": (
            entries.get("layer_norm_before_last_layer", True) is not True, "a model without its last norm",
        ),
    })  # fmt: skip
    width, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    check_heads(width, heads, settings.where)
    if width // heads % 2:
        raise CheckpointError(f"{settings.where}: expected an even width of each head, got {width} / {heads}")
    vocabulary = settings.size("vocab_size")
    # two thirds of the width that the configuration names, rounded up to a multiple of 8
    wide = (2 * settings.size("intermediate_size") // 3 + 7) // 8 * 8
    settings.refuse("AMPLIFY", {"intermediate_size": (wide == 0, "a feed-forward block of width 0")})
    return EncoderConfig(
        vocabulary, settings.size("num_hidden_layers"), width, heads, wide,
        norm=Norm("rms", settings.epsilon("norm_eps", 1e-5)), projections=Projections(bias=False),
        feed=FeedForward("silu", gated=True, bias=False), token_dropout=False,
        mask_token=settings.token("mask_token_id", 2, vocabulary), head=Head(dense=False, tied=False),
    )  # fmt: skip


def _alphabet(folder: Path, config: EncoderConfig) -> Alphabet:
    path = folder / "vocab.txt"
    tokens = read_vocabulary(path) if path.is_file() else _VOCABULARIES.get(config.vocabulary)
    if tokens is None:
        raise CheckpointError(
            f"{folder}: expected a vocabulary of {' or '.join(map(str, _VOCABULARIES))} tokens, or a vocab.txt, got "
            f"{config.vocabulary}"
        )
    place = {token: number for number, token in enumerate(tokens)}
    missing = [token for token in _SPECIAL[:5] if token not in place]
    if missing:
        raise CheckpointError(f"{path}: expected the tokens {', '.join(_SPECIAL[:5])}, got none of {missing}")
    pad, unknown, mask, start, end = (place[token] for token in _SPECIAL[:5])
    return Alphabet(tokens, start=start, end=end, mask=mask, unknown=unknown, pad=pad)


def _recognises(entries: Mapping[str, Any]) -> bool:
    return entries.get("model_type") == "AMPLIFY"


AMPLIFY = Family(
    "AMPLIFY", _recognises, _config, (_NAMES,), _alphabet,
    known=(
        Known("chandar-lab/AMPLIFY_120M", 24, 640, 10, "118 M", licence="MIT"),
        Known("chandar-lab/AMPLIFY_350M", 32, 960, 15, "354 M", licence="MIT"),
    ),
)  # fmt: skip
