"""SaProt (Su et al. 2024, doi 10.1101/2023.10.01.560349): ESM-2's encoder over tokens of residue and structure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlens.errors import CheckpointError
from longlens.io.structure_alphabet import StructureAlphabet, structure_tokens
from longlens.models.config import EncoderConfig
from longlens.models.families.entries import ConfigEntries, sizes_of
from longlens.models.families.esm2 import TRANSFORMERS_ESM, rotary_config
from longlens.models.families.family import Family, Known, read_vocabulary

_SPECIAL = ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")
TOKENS = (*_SPECIAL, *structure_tokens())


def _config(settings: ConfigEntries) -> EncoderConfig:
    entries = settings.entries
    settings.refuse("SaProt", {
        "emb_layer_norm_before": (bool(entries.get("emb_layer_norm_before")), "a norm that ESM-2 does not have"),
        "hidden_act": (entries.get("hidden_act", "gelu") != "gelu", "a model with another activation"),
    })  # fmt: skip
    return rotary_config(sizes_of(settings), settings)


def _alphabet(folder: Path, config: EncoderConfig) -> StructureAlphabet:
    path = folder / "vocab.txt"
    tokens = read_vocabulary(path) if path.is_file() else TOKENS
    if tokens != TOKENS:
        odd = next((pair for pair in zip(tokens, TOKENS, strict=False) if pair[0] != pair[1]), ("", ""))
        raise CheckpointError(
            f"{path}: expected SaProt's {len(TOKENS)} tokens, got {len(tokens)}, with {odd[0]!r} for {odd[1]!r}"
        )
    return StructureAlphabet(tokens, start=0, pad=1, end=2, unknown=3, mask=config.mask_token)


def _recognises(entries: Mapping[str, Any]) -> bool:
    rotary = entries.get("position_embedding_type", "absolute") == "rotary"
    return entries.get("model_type") == "esm" and rotary and entries.get("vocab_size") == len(TOKENS)


SAPROT = Family(
    "SaProt", _recognises, _config, (TRANSFORMERS_ESM,), _alphabet,
    known=(
        Known("westlake-repl/SaProt_35M_AF2", 12, 480, 20, "34 M", licence="MIT"),
        Known("westlake-repl/SaProt_650M_AF2", 33, 1280, 20, "652 M", licence="MIT"),
        Known("westlake-repl/SaProt_650M_PDB", 33, 1280, 20, "652 M", licence="MIT"),
        Known("westlake-repl/SaProt_1.3B_AF2", 66, 1280, 20, "1.3 B", licence="MIT"),
    ),
    note="give structures (--structures); without them every structure letter is unknown",
)  # fmt: skip
