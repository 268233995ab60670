"""Trained weights from where they lie: `load("tiny")`, a hub name, a folder, a fair-esm file, an installed package.

Every tensor is accounted for: one that is missing, extra or of another shape is an error that names it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from longlens.errors import CheckpointError
from longlens.io.alphabet import ESM, Alphabet
from longlens.models.encoder import EncoderConfig
from longlens.models.language_model import MaskedLM
from longlens.models.names import FAIR_ESM, TRANSFORMERS_BERT, TRANSFORMERS_ESM, Names

TINY = Path(__file__).parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# a hub's other formats of the same weights are not fetched
_HUB_FILES = ["config.json", "vocab.txt", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*"]


def load(name_or_path: str | Path = "tiny", *, dtype: str = "auto", device: str = "auto") -> MaskedLM:
    """A protein language model, ready to run.

    Args:
        name_or_path: "tiny" (inside this package); "antiberty" (from the installed package of that name); a folder in
            transformers' format (ESM-2 or BERT, safetensors or .bin); a fair-esm `.pt` file, with its
            `-contact-regression.pt` beside it if there is one; otherwise the name of a model on the Hugging Face hub.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU that has it, float32 otherwise.
        device: "cpu", "cuda", ..., or "auto": a GPU where there is one.

    Raises:
        CheckpointError: no such model, or weights that are not those of its architecture.
    """
    chosen = choose_device(device)
    found = _read(name_or_path)
    model = _build(found)
    return model.to(device=chosen, dtype=choose_dtype(dtype, chosen)).eval().requires_grad_(False)


def read_config(name_or_path: str | Path) -> EncoderConfig:
    """The shape of a model, without its weights. Arguments and errors: `load`. A hub's files are fetched first."""
    return _read(name_or_path).config


def choose_device(device: str) -> torch.device:
    """The device that a name means; raises `CheckpointError` where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"expected a device that is there, such as cpu or cuda, got {device!r}: {error}"
        ) from None


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that a name means on a device."""
    if dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if half else torch.float32
    if dtype not in DTYPES:
        raise CheckpointError(f"expected dtype auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def save(model: MaskedLM, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write an ESM-2 model as transformers does (`EsmForMaskedLM`): config.json and model.safetensors."""
    config = model.config
    if not config.pre_norm or config.positions != "rotary":
        raise CheckpointError("expected an ESM-2 architecture (pre-norm, rotary); others are read, not written")
    theirs: dict[str, Tensor] = {}
    ours = model.state_dict()
    for name, sources in TRANSFORMERS_ESM.table(config).items():
        if name in ours:
            parts = ours[name].to(dtype or ours[name].dtype).chunk(len(sources))
            theirs |= {source: part.contiguous() for source, part in zip(sources, parts, strict=True)}
    theirs["esm.rotary_embeddings.inv_freq"] = ours["encoder.rotary.frequencies"]
    written = {
        "architectures": ["EsmForMaskedLM"], "model_type": "esm", "hidden_act": "gelu", "is_folding_model": False,
        "vocab_size": config.vocabulary, "num_hidden_layers": config.layers, "hidden_size": config.width,
        "num_attention_heads": config.heads, "intermediate_size": config.feed_forward,
        "layer_norm_eps": config.norm_eps, "token_dropout": config.token_dropout, "mask_token_id": config.mask_token,
        "pad_token_id": model.alphabet.pad, "position_embedding_type": "rotary", "emb_layer_norm_before": False,
        "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "max_position_embeddings": 1026,
        "tie_word_embeddings": True,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(model.alphabet.tokens) + "\n", encoding="utf-8")
    # through the ordinary way of writing files, which gives them the ordinary permissions
    (folder / "model.safetensors").write_bytes(save_tensors(theirs, metadata={"format": "pt"}))


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint as read: its tensors under their own names, and what they are."""

    source: str
    tensors: dict[str, Tensor]
    names: Names
    config: EncoderConfig
    alphabet: Alphabet


def _read(name_or_path: str | Path) -> _Checkpoint:
    path = Path(name_or_path)
    if name_or_path == "tiny":
        return replace(_read_folder(TINY), source="tiny")
    if name_or_path == "antiberty":
        return _read_antiberty()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file() and path.suffix in (".safetensors", ".bin"):
        raise CheckpointError(f"{path}: expected a model's folder; give {path.parent}, which holds its config.json too")
    if path.is_file():
        return _read_fair_esm(path)
    if path.suffix == ".pt" or str(name_or_path).startswith((".", "/", "~")):
        raise CheckpointError(f"expected a model's folder or fair-esm file, found nothing at {path}")
    return replace(_read_folder(_fetch(str(name_or_path))), source=str(name_or_path))


def _fetch(name: str) -> Path:
    """The hub's files, from its cache or over the network."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"found no file or folder {name!r}; to take it from the Hugging Face hub, pip install huggingface_hub"
        )
    from huggingface_hub import HfApi, snapshot_download

    try:
        there = HfApi().list_repo_files(name)
    except Exception:
        # without a network the cache may still have it
        there = []
    doubled = ["pytorch_model*"] if any(file.endswith(".safetensors") for file in there) else None
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=doubled))
    except Exception as error:
        raise CheckpointError(
            f"expected a model's folder, a fair-esm file or a model of the Hugging Face hub, could not get {name!r}: "
            f"{error}"
        ) from error


def _read_folder(folder: Path) -> _Checkpoint:
    """transformers' format."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"expected {folder} to hold config.json, found none")
    try:
        said = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{config_file}: expected JSON, got something else ({error}); fetch it again") from None
    kind = said.get("model_type")
    if kind not in ("esm", "bert"):
        raise CheckpointError(f"{folder}: expected model_type esm or bert, got {kind!r}")
    try:
        config = _esm_config(said, folder) if kind == "esm" else _bert_config(said, folder)
    except KeyError as error:
        raise CheckpointError(f"{config_file}: expected it to say {error}, it does not") from None
    names = TRANSFORMERS_ESM if kind == "esm" else TRANSFORMERS_BERT
    alphabet = ESM if kind == "esm" else _bert_alphabet(folder / "vocab.txt")
    if len(alphabet) != config.vocabulary:
        raise CheckpointError(f"{folder}: expected {config.vocabulary} tokens in its vocabulary, got {len(alphabet)}")
    # LayerNorm's parameters in the oldest checkpoints
    tensors = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): tensor
        for name, tensor in _read_tensors(folder).items()
    }
    return _Checkpoint(str(folder), tensors, names, config, alphabet)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    for stem, read in (("model.safetensors", load_file), ("pytorch_model.bin", _torch_load)):
        index, single = folder / f"{stem}.index.json", folder / stem
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in _read_file(read, folder / shard).items()}
        if single.is_file():
            return _read_file(read, single)
    raise CheckpointError(f"expected {folder} to hold model.safetensors or pytorch_model.bin, found neither")


def _read_file(read: Callable[[Path], dict[str, Tensor]], path: Path) -> dict[str, Tensor]:
    try:
        return read(path)
    except FileNotFoundError:
        raise CheckpointError(f"expected {path}, which the index names, found none; fetch the folder again") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: cut off or not a file of weights ({error}); fetch it again") from error


def _torch_load(path: Path) -> dict[str, Any]:
    # a Namespace holds plain values; everything else that could run code is refused
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _esm_config(said: Mapping[str, Any], folder: Path) -> EncoderConfig:
    refused = {
        "position_embedding_type": said.get("position_embedding_type", "absolute") != "rotary",
        "emb_layer_norm_before": bool(said.get("emb_layer_norm_before")),
        "is_folding_model": bool(said.get("is_folding_model")),
        "hidden_act": said.get("hidden_act", "gelu") != "gelu",
    }
    for field, odd in refused.items():
        if odd:
            raise CheckpointError(f"{folder}: expected ESM-2's architecture, got {field} = {said.get(field)!r}")
    return EncoderConfig(
        **_sizes(said),
        token_dropout=said.get("token_dropout", False),
        mask_token=said.get("mask_token_id", ESM.mask),
    )


def _bert_config(said: Mapping[str, Any], folder: Path) -> EncoderConfig:
    refused = {
        "hidden_act": said.get("hidden_act", "gelu") != "gelu",
        "position_embedding_type": said.get("position_embedding_type", "absolute") != "absolute",
        "is_decoder": bool(said.get("is_decoder")),
    }
    for field, odd in refused.items():
        if odd:
            raise CheckpointError(f"{folder}: expected BERT's encoder with gelu, got {field} = {said.get(field)!r}")
    return EncoderConfig(
        **_sizes(said),
        pre_norm=False,
        positions="absolute",
        max_length=said["max_position_embeddings"],
        token_dropout=False,
    )


def _sizes(said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocabulary": said["vocab_size"],
        "layers": said["num_hidden_layers"],
        "width": said["hidden_size"],
        "heads": said["num_attention_heads"],
        "feed_forward": said["intermediate_size"],
        "norm_eps": said.get("layer_norm_eps", 1e-12),
    }


def _bert_alphabet(vocabulary: Path) -> Alphabet:
    if not vocabulary.is_file():
        raise CheckpointError(f"expected a vocabulary at {vocabulary}, found none")
    tokens = tuple(vocabulary.read_text(encoding="utf-8").split())
    place = {token: number for number, token in enumerate(tokens)}
    special = ("[CLS]", "[SEP]", "[MASK]", "[UNK]", "[PAD]")
    missing = [token for token in special if token not in place]
    if missing:
        raise CheckpointError(f"{vocabulary}: expected the tokens {', '.join(special)}, got none of {missing}")
    start, end, mask, unknown, pad = (place[token] for token in special)
    return Alphabet(tokens, start=start, end=end, mask=mask, unknown=unknown, pad=pad)


def _read_antiberty() -> _Checkpoint:
    """AntiBERTy's weights and vocabulary from its package; none of its code is imported."""
    spec = importlib.util.find_spec("antiberty")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError("expected the package antiberty; pip install antiberty==0.1.3 --no-deps")
    folder = Path(spec.submodule_search_locations[0]) / "trained_models"
    weights = folder / "AntiBERTy_md_smooth"
    config = _bert_config(json.loads((weights / "config.json").read_text(encoding="utf-8")), weights)
    alphabet = _bert_alphabet(folder / "vocab.txt")
    return _Checkpoint("antiberty", _read_tensors(weights), TRANSFORMERS_BERT, config, alphabet)


def _read_fair_esm(path: Path) -> _Checkpoint:
    said = _torch_load(path)
    cfg = said.get("cfg", {}).get("model") if isinstance(said, dict) else None
    if cfg is None:
        raise CheckpointError(f"{path}: expected a fair-esm ESM-2 file with cfg.model, got keys {sorted(said)[:10]}")
    config = EncoderConfig(
        vocabulary=len(ESM),
        layers=cfg.encoder_layers,
        width=cfg.encoder_embed_dim,
        heads=cfg.encoder_attention_heads,
        feed_forward=4 * cfg.encoder_embed_dim,
        token_dropout=cfg.token_dropout,
    )
    tensors = {
        name.removeprefix("encoder.").removeprefix("sentence_encoder."): tensor
        for name, tensor in said["model"].items()
    }
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    if regression.is_file():
        tensors |= _torch_load(regression)["model"]
    return _Checkpoint(str(path), tensors, FAIR_ESM, config, ESM)


def _build(found: _Checkpoint) -> MaskedLM:
    """The model with every tensor in its place."""
    tensors = dict(found.tensors)
    for copy, original in found.names.tied:
        extra = tensors.pop(copy, None)
        if extra is not None and original in tensors and not torch.equal(extra, tensors[original]):
            raise CheckpointError(f"{found.source}: expected {copy} to equal {original} (tied), got other values")
    table = found.names.table(found.config)
    contacts = found.names.contact is not None and f"{found.names.contact}.weight" in tensors
    if not contacts:
        table = {ours: sources for ours, sources in table.items() if not ours.startswith("contact_head.")}
    frequencies = _frequencies(found, tensors)
    types = tensors.pop(found.names.token_type, None) if found.names.token_type else None
    with torch.device("meta"):
        model = MaskedLM(found.config, found.alphabet, contacts=contacts)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    for ours, sources in table.items():
        parts = [tensors.pop(source, None) for source in sources]
        absent = [source for source, part in zip(sources, parts, strict=True) if part is None]
        problems += [f"missing {source}" for source in absent]
        present = [part for part in parts if part is not None]
        shape = torch.Size((wanted[ours][0] // len(sources), *wanted[ours][1:]))
        for source, part in zip(sources, parts, strict=True):
            if part is not None and part.shape != shape:
                problems.append(f"{source} of shape {tuple(part.shape)}, expected {tuple(shape)}")
        if not absent:
            state[ours] = present[0].float() if len(present) == 1 else torch.cat(present).float()
    problems += [f"extra {name}" for name in tensors if not name.startswith(found.names.ignored or ("\0",))]
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(
            f"{found.source}: expected the tensors of {found.config}: {'; '.join(problems[:12])}{more}"
        )
    if types is not None:
        # every token is of type 0, so its vector is part of every position's
        state["encoder.position.weight"] = state["encoder.position.weight"] + types[0].float()
    if found.config.positions == "rotary":
        state["encoder.rotary.frequencies"] = frequencies
    model.load_state_dict(state, strict=True, assign=True)
    model.source = found.source
    return model


def _frequencies(found: _Checkpoint, tensors: dict[str, Tensor]) -> Tensor:
    """The checkpoint's rotary frequencies, taken out of `tensors`; the formula's where it has none."""
    from longlens.models.rotary import Rotary

    given = {name: tensors.pop(name) for name in found.names.frequency_names(found.config) if name in tensors}
    formula = Rotary(found.config.head_width).frequencies
    for name, tensor in given.items():
        if tensor.shape != formula.shape:
            raise CheckpointError(
                f"{found.source}: {name} of shape {tuple(tensor.shape)}, expected {tuple(formula.shape)}"
            )
        if not torch.equal(tensor, next(iter(given.values()))):
            raise CheckpointError(
                f"{found.source}: expected the same rotary frequencies in every layer, {name} differs"
            )
    return next(iter(given.values())).float() if given else formula
