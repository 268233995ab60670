"""fair-esm's `.pt` files of ESM-2, with the contact head in a file beside them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlens.errors import CheckpointError
from longlens.io.alphabet import ESM
from longlens.models.checkpoints.checkpoint import Checkpoint
from longlens.models.checkpoints.configuration import ConfigEntries, check_heads, rotary_config
from longlens.models.checkpoints.names import FAIR_ESM
from longlens.models.checkpoints.tensors import CheckpointTensors, TensorFile, TorchFile, read_torch_values
from longlens.models.encoder import EncoderConfig

# names of architectures in fair-esm's older files
_OTHER_MODELS = {
    "roberta_large": "ESM-1b or ESM-1v, whose positions are learned",
    "protein_bert_base": "ESM-1",
    "msa_transformer": "MSA Transformer",
    "gvp_transformer": "ESM-IF1",
}


def read_fair_esm(path: Path) -> Checkpoint:
    """An ESM-2 file. Raises `CheckpointError` for the file of another model, which it names, and for a broken file."""
    config = _config(read_torch_values(path), path)
    files: list[TensorFile] = [TorchFile(path, lambda content: content["model"])]
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    if regression.is_file():
        files.append(TorchFile(regression, lambda content: content["model"]))
    tensors = CheckpointTensors(files, lambda name: name.removeprefix("encoder.").removeprefix("sentence_encoder."))
    return Checkpoint(str(path), tensors, FAIR_ESM, config, ESM)


def _config(content: Any, path: Path) -> EncoderConfig:
    cfg = content.get("cfg") if isinstance(content, Mapping) else None
    model = cfg.get("model") if isinstance(cfg, Mapping) else None
    entries = vars(model) if isinstance(model, argparse.Namespace) else model
    if not isinstance(entries, Mapping) or not isinstance(content.get("model"), Mapping):
        raise CheckpointError(f"{path}: expected a fair-esm file of ESM-2, with cfg.model, got {_kind(content)}")
    settings = ConfigEntries(entries, f"{path}, cfg.model")
    width, heads = settings.size("encoder_embed_dim"), settings.size("encoder_attention_heads")
    check_heads(width, heads, settings.where)
    sizes = {
        "vocabulary": len(ESM),
        "layers": settings.size("encoder_layers"),
        "width": width,
        "heads": heads,
        "feed_forward": 4 * width,
    }
    return rotary_config(sizes, settings)


def _kind(content: Any) -> str:
    """A description of the contents of a file that is not ESM-2, for messages."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [str(name) for name in content]
    arch = getattr(content.get("args"), "arch", None)
    if arch is not None:
        return f"{_OTHER_MODELS.get(str(arch), 'another model')} (arch {arch!r:.40})"
    inner = content.get("model")
    if isinstance(inner, Mapping) and inner and all("contact_head" in str(name) for name in inner):
        return "a contact regression alone; give the file of the model in the same folder"
    if any(name.endswith(("embed_tokens.weight", "word_embeddings.weight")) for name in names):
        return "tensors without a configuration; give a folder with config.json"
    return f"keys {', '.join(sorted(names)[:10]) or 'none'}"
