"""ESM-1b (Rives et al. 2021) and ESM-1v (Meier et al. 2021): ESM-2's layer with learned positions, 1,022 residues.

ESM-1b normalises the embedding after adding positions, ESM-1v does not. fair-esm zeroes the embedding of `<mask>` when
it reads its own files, and the head shares that embedding; transformers' folders have it zeroed already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from longlens.io.alphabet import ESM
from longlens.models.config import EncoderConfig
from longlens.models.families.entries import ConfigEntries, sizes_of
from longlens.models.families.esm2 import FAIR_ESM, TRANSFORMERS_ESM, esm_alphabet
from longlens.models.families.family import Family, Known
from longlens.models.families.names import TensorNames
from longlens.models.parts.positions import LearnedPositions

# the first rows of the table belong to padding
FIRST_ROW = 2

_TRANSFORMERS = replace(
    TRANSFORMERS_ESM,
    position="esm.embeddings.position_embeddings.weight",
    position_norm="esm.embeddings.layer_norm",
    ignored=("esm.embeddings.position_ids", "esm.pooler.", "classifier."),
    frequencies=(),
)


def _zero_mask(name: str, tensor: Tensor, config: EncoderConfig) -> Tensor:
    if name != FAIR_ESM.embedding:
        return tensor
    tensor = tensor.clone()
    tensor[config.mask_token] = 0.0
    return tensor


FAIR_ESM1: TensorNames = replace(
    FAIR_ESM, position="embed_positions.weight", position_norm="emb_layer_norm_before",
    reorder=_zero_mask, frequencies=(),
)  # fmt: skip


def learned_config(sizes: dict[str, Any], settings: ConfigEntries, rows: int, *, normed: bool) -> EncoderConfig:
    """The configuration of an ESM-1b (`normed`) or ESM-1v encoder, with a table of `rows` positions."""
    mask = settings.token("mask_token_id", ESM.require_mask(), sizes["vocabulary"])
    return EncoderConfig(
        **sizes, positions=LearnedPositions(rows, FIRST_ROW, normed),
        token_dropout=settings.flag("token_dropout"), mask_token=mask,
    )  # fmt: skip


def _config(settings: ConfigEntries) -> EncoderConfig:
    entries = settings.entries
    settings.refuse("ESM-1b or ESM-1v", {
        "is_folding_model": (bool(entries.get("is_folding_model")), "ESMFold"),
        "position_embedding_type": (
            entries.get("position_embedding_type", "absolute") != "absolute", "an ESM with other positions",
        ),
        "pad_token_id": (entries.get("pad_token_id", 1) != 1, "an ESM with another padding token"),
        "hidden_act": (entries.get("hidden_act", "gelu") != "gelu", "a model with another activation"),
    })  # fmt: skip
    rows = settings.size("max_position_embeddings")
    return learned_config(sizes_of(settings), settings, rows, normed=settings.flag("emb_layer_norm_before"))


def _recognises(entries: Mapping[str, Any]) -> bool:
    return entries.get("model_type") == "esm" and entries.get("position_embedding_type", "absolute") != "rotary"


_1V = "one of five models, which are averaged: give all five to --model"

ESM1 = Family(
    "ESM-1b/ESM-1v", _recognises, _config, (_TRANSFORMERS,), esm_alphabet,
    known=(
        Known("facebook/esm1b_t33_650M_UR50S", 33, 1280, 20, "652 M", licence="MIT", limit=1022, contacts=True),
        *(
            Known(f"facebook/esm1v_t33_650M_UR90S_{number}", 33, 1280, 20, "652 M", "MIT", 1022, note=_1V)
            for number in range(1, 6)
        ),
    ),
)  # fmt: skip
