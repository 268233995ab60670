"""fair-esm's `.pt` files of ESM-1b, ESM-1v and ESM-2, with the contact head in a file beside them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlens.errors import CheckpointError
from longlens.io.alphabet import ESM
from longlens.models.checkpoints.checkpoint import Checkpoint
from longlens.models.checkpoints.tensors import CheckpointTensors, TensorFile, TorchFile, read_torch_values
from longlens.models.config import EncoderConfig
from longlens.models.families.entries import ConfigEntries, check_heads
from longlens.models.families.esm1 import FAIR_ESM1, learned_config
from longlens.models.families.esm2 import FAIR_ESM, rotary_config

# names of architectures in fair-esm's older files
_OTHER_MODELS = {
    "protein_bert_base": "ESM-1",
    "msa_transformer": "MSA Transformer",
    "gvp_transformer": "ESM-IF1",
}
# ESM-1b and ESM-1v
_LEARNED = "roberta_large"


def read_fair_esm(path: Path) -> Checkpoint:
    """A file of ESM-1b, ESM-1v or ESM-2.

    Raises `CheckpointError` for the file of another model, which it names, and for a broken file.
    """
    content = read_torch_values(path)
    files: list[TensorFile] = []
    older = isinstance(content, Mapping) and getattr(content.get("args"), "arch", None) == _LEARNED
    if older and isinstance(content.get("model"), Mapping):
        names = FAIR_ESM1
        files.append(TorchFile(path, _model_of))
        config = _older_config(content["args"], CheckpointTensors(files, names.name), path)
    else:
        names, config = FAIR_ESM, _config(content, path)
        files.append(TorchFile(path, _model_of))
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    if regression.is_file():
        files.append(TorchFile(regression, _model_of))
    return Checkpoint(str(path), CheckpointTensors(files, names.name), names, config, ESM)


def _model_of(content: Any) -> Any:
    return content["model"]


def _older_config(args: argparse.Namespace, tensors: CheckpointTensors, path: Path) -> EncoderConfig:
    """ESM-1b or ESM-1v, whose settings may be called `encoder_layers` or `layers`."""
    entries = {name.removeprefix("encoder_"): value for name, value in vars(args).items()}
    settings = ConfigEntries(entries, f"{path}, args")
    table = tensors.infos.get("embed_positions.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{path}: expected embed_positions.weight (rows, width), as ESM-1b and ESM-1v have")
    width, heads = settings.size("embed_dim"), settings.size("attention_heads")
    check_heads(width, heads, settings.where)
    sizes = {
        "vocabulary": len(ESM), "layers": settings.size("layers"), "width": width, "heads": heads,
        "feed_forward": settings.size("ffn_embed_dim"),
    }  # fmt: skip
    normed = "emb_layer_norm_before.weight" in tensors.infos
    return learned_config(sizes, settings, table.shape[0], normed=normed)


def _config(content: Any, path: Path) -> EncoderConfig:
    cfg = content.get("cfg") if isinstance(content, Mapping) else None
    model = cfg.get("model") if isinstance(cfg, Mapping) else None
    entries = vars(model) if isinstance(model, argparse.Namespace) else model
    if not isinstance(entries, Mapping) or not isinstance(content.get("model"), Mapping):
        raise CheckpointError(
            f"{path}: expected a fair-esm file of ESM-2, with cfg.model, or of ESM-1b or ESM-1v, got {_kind(content)}"
        )
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
