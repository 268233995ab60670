"""ESM-2 (Lin et al. 2023, doi 10.1126/science.ade2574): transformers' folders, and fair-esm's `.pt` files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlens.errors import CheckpointError
from longlens.io.alphabet import ESM, Alphabet
from longlens.models.config import EncoderConfig
from longlens.models.families.entries import ConfigEntries, sizes_of
from longlens.models.families.family import HF_LAYER, HF_PARTS, Family, Known, modern_name
from longlens.models.families.names import TensorNames

TRANSFORMERS_ESM = TensorNames(
    embedding="esm.embeddings.word_embeddings.weight",
    norm="esm.encoder.emb_layer_norm_after",
    layer={
        "qkv": tuple(f"esm.{HF_LAYER}attention.self.{part}" for part in ("query", "key", "value")),
        "attention_norm": f"esm.{HF_LAYER}attention.LayerNorm",
        "out": f"esm.{HF_LAYER}attention.output.dense",
        "feed_norm": f"esm.{HF_LAYER}LayerNorm",
        "up": f"esm.{HF_LAYER}intermediate.dense",
        "down": f"esm.{HF_LAYER}output.dense",
    },
    head={"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "bias": "lm_head.bias"},
    contact="esm.contact_head.regression",
    prefix="esm.",
    rename=modern_name,
    # transformers 4; transformers 5 in memory; 5 on disk, where the name has a literal star (as of 5.23)
    frequencies=(
        f"esm.{HF_LAYER}attention.self.rotary_embeddings.inv_freq",
        "esm.rotary_embeddings.inv_freq",
        "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq",
    ),
    tied=(
        ("lm_head.decoder.weight", "esm.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "lm_head.bias"),
    ),
    bare=HF_PARTS,
    # rotary checkpoints have unused learned positions too; classifiers of sequences and of residues
    ignored=("esm.embeddings.position_ids", "esm.embeddings.position_embeddings.", "esm.pooler.", "classifier."),
)

FAIR_ESM = TensorNames(
    embedding="embed_tokens.weight",
    norm="emb_layer_norm_after",
    layer={
        "qkv": tuple(f"layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
        "attention_norm": "layers.{i}.self_attn_layer_norm",
        "out": "layers.{i}.self_attn.out_proj",
        "feed_norm": "layers.{i}.final_layer_norm",
        "up": "layers.{i}.fc1",
        "down": "layers.{i}.fc2",
    },
    head={"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "bias": "lm_head.bias"},
    rename=lambda name: name.removeprefix("encoder.").removeprefix("sentence_encoder."),
    contact="contact_head.regression",
    frequencies=("layers.{i}.self_attn.rot_emb.inv_freq",),
    tied=(("lm_head.weight", "embed_tokens.weight"),),
)


def rotary_config(sizes: dict[str, Any], settings: ConfigEntries) -> EncoderConfig:
    """The configuration of an ESM-2 encoder of these sizes."""
    if sizes["width"] // sizes["heads"] % 2:
        raise CheckpointError(
            f"{settings.where}: expected an even width of each head for rotary positions, got "
            f"{sizes['width']} / {sizes['heads']}"
        )
    mask = settings.token("mask_token_id", ESM.require_mask(), sizes["vocabulary"])
    return EncoderConfig(**sizes, token_dropout=settings.flag("token_dropout"), mask_token=mask)


def _config(settings: ConfigEntries) -> EncoderConfig:
    entries = settings.entries
    settings.refuse("ESM-2", {
        "is_folding_model": (bool(entries.get("is_folding_model")), "ESMFold"),
        "emb_layer_norm_before": (bool(entries.get("emb_layer_norm_before")), "a norm that ESM-2 does not have"),
        "hidden_act": (entries.get("hidden_act", "gelu") != "gelu", "a model with another activation"),
    })  # fmt: skip
    return rotary_config(sizes_of(settings), settings)


def esm_alphabet(folder: Path, config: EncoderConfig) -> Alphabet:
    """The alphabet of every ESM-1b, ESM-1v and ESM-2 model."""
    return ESM


def _recognises(entries: Mapping[str, Any]) -> bool:
    return entries.get("model_type") == "esm" and entries.get("position_embedding_type", "absolute") == "rotary"


ESM2 = Family(
    "ESM-2", _recognises, _config, (TRANSFORMERS_ESM,), esm_alphabet,
    known=(
        Known("facebook/esm2_t6_8M_UR50D", 6, 320, 20, "7.5 M", "MIT", contacts=True),
        Known("facebook/esm2_t12_35M_UR50D", 12, 480, 20, "33.5 M", "MIT", contacts=True),
        Known("facebook/esm2_t30_150M_UR50D", 30, 640, 20, "148 M", "MIT", contacts=True),
        Known("facebook/esm2_t33_650M_UR50D", 33, 1280, 20, "651 M", "MIT", contacts=True),
        Known("facebook/esm2_t36_3B_UR50D", 36, 2560, 40, "2.84 B", "MIT", contacts=True),
        Known("facebook/esm2_t48_15B_UR50D", 48, 5120, 40, "15.1 B", "MIT", contacts=True),
        Known("tiny", 5, 256, 4, "4.0 M", "Apache-2.0", note="inside this package, to try longlens with; a weak model"),
    ),
)  # fmt: skip
