"""Models of the Hugging Face hub, from its cache or over the network."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from longlens.errors import CheckpointError
from longlens.models.checkpoints.configuration import encoder_config, read_json
from longlens.models.encoder import EncoderConfig
from longlens.models.families.pieces import FILES as TOKENIZER_FILES
from longlens.models.families.registry import family_of

_SMALL_FILES = ["config.json", "vocab.txt"]
# the hub's other formats of the same weights are not fetched
_FILES = [*_SMALL_FILES, *TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*"]
# names of fair-esm, which lack the organisation that names on the hub have
_FAIR_ESM = re.compile(r"esm(2|1b|1v)_t\d+_\w+")


def fetch(name: str) -> Path:
    """The folder of a model's files.

    Raises `CheckpointError` if they cannot be fetched, and for another architecture, before its weights are fetched.
    """
    config = _small_files(name) / "config.json"
    if config.is_file():
        encoder_config(read_json(config), Path(name))
    return _snapshot(name, _FILES)


def fetch_config(name: str) -> EncoderConfig:
    """The shape of a model, of whose files its configuration alone is fetched. Errors: `fetch`."""
    config = _small_files(name) / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{name}: expected a model of the hub to have a config.json, found none")
    return encoder_config(read_json(config), Path(name))


def hub_takes_chains(name: str) -> bool:
    """Whether a model takes complexes of several chains (`Family.chains`). Errors: `fetch`."""
    config = _small_files(name) / "config.json"
    return config.is_file() and family_of(read_json(config), name).chains


def _small_files(name: str) -> Path:
    if _FAIR_ESM.fullmatch(name):
        raise CheckpointError(
            f"found no file or folder {name!r}; on the Hugging Face hub that model is called facebook/{name}: give "
            "this name, or the path of fair-esm's .pt file"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"found no file or folder {name!r}; to take it from the Hugging Face hub, pip install 'longlens[hub]'"
        )
    return _snapshot(name, _SMALL_FILES)


def _snapshot(name: str, files: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        file_names = HfApi().list_repo_files(name)
    except Exception:
        # without a network connection the cache may still hold the model
        file_names = []
    doubled = ["pytorch_model*"] if any(file.endswith(".safetensors") for file in file_names) else None
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=doubled))
    except Exception as error:
        raise CheckpointError(
            f"expected a model's folder, a fair-esm file or a model of the Hugging Face hub, could not get {name!r}: "
            f"{error}"
        ) from error
