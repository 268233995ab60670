"""ESM-C (ESM Cambrian; Biohub 2024): SwiGLU, normed queries and keys, residuals divided by sqrt(layers / 36).

Its weights come in three layouts: transformers' (`EsmcForMaskedLM`), the research folders on the hub, which
TransformerEngine wrote, and the `.pth` files of the package `esm`, which have no configuration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from longlens.errors import CheckpointError
from longlens.io.alphabet import ESM, Alphabet
from longlens.models.config import EncoderConfig
from longlens.models.families.entries import ConfigEntries, check_heads
from longlens.models.families.family import Family, Known
from longlens.models.families.names import TensorNames
from longlens.models.parts.feed_forward import FeedForward
from longlens.models.parts.head import Head
from longlens.models.parts.norm import Norm
from longlens.models.parts.positions import RotaryPositions
from longlens.models.parts.projections import Projections

HEAD_WIDTH = 64
# rows of the embedding and of the head; those from 33 on have no token, and take part in the softmax
VOCABULARY = 64

ALPHABET = replace(
    ESM, tokens=(*ESM.tokens[:31], "|", "<mask>", *(f"<null_{number}>" for number in range(33, VOCABULARY))),
    chain_break=31,
)  # fmt: skip

_TRANSFORMERS = TensorNames(
    embedding="esmc.embed_tokens.weight",
    norm="esmc.norm",
    layer={
        "attention_norm": "esmc.layers.{i}.input_layernorm",
        "qkv": tuple(f"esmc.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
        "query_norm": "esmc.layers.{i}.self_attn.q_norm",
        "key_norm": "esmc.layers.{i}.self_attn.k_norm",
        "out": "esmc.layers.{i}.self_attn.o_proj",
        "feed_norm": "esmc.layers.{i}.post_attention_layernorm",
        "up": ("esmc.layers.{i}.mlp.gate_proj", "esmc.layers.{i}.mlp.up_proj"),
        "down": "esmc.layers.{i}.mlp.down_proj",
    },
    head={
        "dense": "lm_head.dense", "norm": "lm_head.layer_norm", "decoder": "lm_head.decoder.weight",
        "bias": "lm_head.decoder.bias",
    },
    prefix="esmc.",
    bare=("embed_tokens.", "layers.", "norm."),
    ignored=("classifier.", "esmc.rotary_emb."),
)  # fmt: skip

# TransformerEngine's names of a norm that is part of the layer that follows it
_FUSED = (
    ("layernorm_qkv.layer_norm_weight", "layernorm_qkv.0.weight"),
    ("layernorm_qkv.layer_norm_bias", "layernorm_qkv.0.bias"),
    ("layernorm_qkv.weight", "layernorm_qkv.1.weight"),
    ("ffn.layer_norm_weight", "ffn.0.weight"),
    ("ffn.layer_norm_bias", "ffn.0.bias"),
    ("ffn.fc1_weight", "ffn.1.weight"),
    ("ffn.fc2_weight", "ffn.3.weight"),
)


def package_name(name: str) -> str | None:
    """The name in the package `esm` of a tensor that is called so there or in a research folder."""
    if name.endswith("._extra_state"):
        return None
    name = name.removeprefix("esmc.")
    name = f"sequence_head.{name.removeprefix('lm_head.')}" if name.startswith("lm_head.") else name
    for fused, apart in _FUSED:
        if name.endswith(f".{fused}"):
            return name.removesuffix(fused) + apart
    return name


PACKAGE = TensorNames(
    embedding="embed.weight",
    norm="transformer.norm",
    layer={
        "attention_norm": "transformer.blocks.{i}.attn.layernorm_qkv.0",
        "qkv": "transformer.blocks.{i}.attn.layernorm_qkv.1",
        "query_norm": "transformer.blocks.{i}.attn.q_ln",
        "key_norm": "transformer.blocks.{i}.attn.k_ln",
        "out": "transformer.blocks.{i}.attn.out_proj",
        "feed_norm": "transformer.blocks.{i}.ffn.0",
        "up": "transformer.blocks.{i}.ffn.1",
        "down": "transformer.blocks.{i}.ffn.3",
    },
    head={
        "dense": "sequence_head.0", "norm": "sequence_head.2", "decoder": "sequence_head.3.weight",
        "bias": "sequence_head.3.bias",
    },
    rename=package_name,
    # the angles' frequencies, which are those of the formula
    ignored=("transformer.rotary", "classifier."),
)  # fmt: skip


def esmc_config(
    vocabulary: int, layers: int, width: int, heads: int, feed_forward: int, base: float = 10_000.0
) -> EncoderConfig:
    """The encoder of an ESM-C of these sizes, and this base of the rotary angles."""
    bare = Norm(bias=False)
    return EncoderConfig(
        vocabulary, layers, width, heads, feed_forward, norm=Norm(), last_norm=bare,
        projections=Projections(bias=False, query_key_norm=bare), feed=FeedForward("silu", gated=True, bias=False),
        positions=RotaryPositions(base), residual_divisor=(layers / 36) ** 0.5, token_dropout=False,
        mask_token=ALPHABET.require_mask(), head=Head(tied=False),
    )  # fmt: skip


def hidden_width(width: int) -> int:
    """The width of the feed-forward block: 8/3 of the width, rounded up to a multiple of 256."""
    return int((8 / 3 * width + 255) // 256 * 256)


def config_of_package(shapes: Mapping[str, tuple[int, ...]], where: str) -> EncoderConfig:
    """The encoder that the shapes of a file of the package tell. Raises `CheckpointError` if they do not."""
    blocks = {int(found[1]) for name in shapes if (found := re.match(r"transformer\.blocks\.(\d+)\.", name))}
    embedding, down = shapes.get(PACKAGE.embedding, ()), shapes.get("transformer.blocks.0.ffn.3.weight", ())
    if len(embedding) != 2 or len(down) != 2 or blocks != set(range(len(blocks))):
        raise CheckpointError(
            f"{where}: expected the tensors of ESM-C, embed.weight and transformer.blocks.0 to its last, got "
            f"{', '.join(sorted(shapes)[:4])}, ..."
        )
    vocabulary, width = embedding
    check_heads(width, max(1, width // HEAD_WIDTH), where)
    if vocabulary != VOCABULARY or width % HEAD_WIDTH:
        raise CheckpointError(
            f"{where}: expected an embedding of {VOCABULARY} tokens and heads of width {HEAD_WIDTH}, got {embedding}"
        )
    return esmc_config(vocabulary, len(blocks), width, width // HEAD_WIDTH, down[1])


def _config(settings: ConfigEntries) -> EncoderConfig:
    entries = settings.entries
    if "d_model" in entries:
        width, heads, layers = settings.size("d_model"), settings.size("n_heads"), settings.size("n_layers")
        check_heads(width, heads, settings.where)
        return esmc_config(VOCABULARY, layers, width, heads, hidden_width(width), _rotary_base(settings))
    width, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    check_heads(width, heads, settings.where)
    same_heads = entries.get("num_key_value_heads") in (None, heads) and entries.get("head_dim") in (
        None, width // heads,
    )  # fmt: skip
    settings.refuse("ESM-C", {
        "hidden_act": (entries.get("hidden_act", "silu") != "silu", "a model with another activation"),
        "attention_bias": (bool(entries.get("attention_bias")), "a model with biases"),
        "mlp_bias": (bool(entries.get("mlp_bias")), "a model with biases"),
        "tie_word_embeddings": (bool(entries.get("tie_word_embeddings")), "a model with a tied head"),
        "num_key_value_heads": (not same_heads, "a model with other heads"),
    })  # fmt: skip
    return esmc_config(
        settings.size("vocab_size"), settings.size("num_hidden_layers"), width, heads,
        settings.size("intermediate_size"), _rotary_base(settings),
    )  # fmt: skip


def _rotary_base(settings: ConfigEntries) -> float:
    """The base of the angles, from `rope_parameters`, or `rope_theta` and `rope_scaling` as transformers 4 writes it.

    Raises `CheckpointError` for other rotary positions, and where two entries disagree.
    """
    entries = settings.entries
    said = {"rope_theta": entries["rope_theta"]} if "rope_theta" in entries else {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = entries.get(name)
        if rope is None:
            continue
        kinds = {"rope_type", "type"}
        plain = isinstance(rope, Mapping) and rope.keys() <= kinds | {"rope_theta"} and all(
            rope.get(kind, "default") == "default" for kind in kinds
        )  # fmt: skip
        settings.refuse("ESM-C", {name: (not plain, "a model with other rotary positions")})
        if "rope_theta" in rope:
            said[f"rope_theta of {name}"] = rope["rope_theta"]
    for name, base in said.items():
        if not isinstance(base, int | float) or isinstance(base, bool) or not 0 < base < math.inf:
            raise CheckpointError(f"{settings.where}: expected {name} to be a number above 0, got {base!r:.60}")
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{name} = {base}" for name, base in said.items())
        raise CheckpointError(f"{settings.where}: expected one base of the rotary angles, got {listed}")
    return float(next(iter(said.values()), 10_000.0))


def _recognises(entries: Mapping[str, Any]) -> bool:
    names = entries.get("architectures")
    first = str(names[0]) if isinstance(names, list) and names else ""
    research = {"d_model", "n_heads", "n_layers"} <= entries.keys() and first.startswith("ESMC")
    return entries.get("model_type") == "esmc" or research


def _alphabet(folder: Path, config: EncoderConfig) -> Alphabet:
    return ALPHABET


ESMC = Family(
    "ESM-C", _recognises, _config, (_TRANSFORMERS, PACKAGE), _alphabet,
    known=(
        Known("biohub/ESMC-300M", 30, 960, 15, "333 M", licence="MIT"),
        Known("biohub/ESMC-600M", 36, 1152, 18, "575 M", licence="MIT"),
        Known("biohub/ESMC-6B", 80, 2560, 40, "6.4 B", licence="MIT"),
    ),
    chains=True,
)  # fmt: skip
