"""Models of the Hugging Face hub, from its cache or over the network."""

from __future__ import annotations

import importlib.util
import re
from difflib import get_close_matches
from pathlib import Path

from longlens.errors import CheckpointError
from longlens.models.checkpoints.configuration import encoder_config, read_json
from longlens.models.encoder import EncoderConfig
from longlens.models.families.pieces import FILES as TOKENIZER_FILES
from longlens.models.families.registry import FAMILIES, family_of

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
    return _snapshot(name, _FILES, _doubled(name))


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
    if _FAIR_ESM.fullmatch(name) and f"facebook/{name}" in _published():
        raise CheckpointError(
            f"found no file or folder {name!r}; on the Hugging Face hub that model is called facebook/{name}: give "
            "this name, or the path of fair-esm's .pt file"
        )
    if "/" not in name:
        # as all names of protein models on the hub have
        raise CheckpointError(
            f"expected a model, found no file or folder {name!r}, and names on the Hugging Face hub have an "
            f"organisation and a slash{nearest_name(name)}"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"found no file or folder {name!r}; to take it from the Hugging Face hub, pip install 'longlens[hub]'"
        )
    return _snapshot(name, _SMALL_FILES)


def _snapshot(name: str, files: list[str], doubled: list[str] | None = None) -> Path:
    """`doubled`: files that are not fetched although `files` names them."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=doubled))
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise CheckpointError(
            f"expected a model's folder, a fair-esm file or a model of the Hugging Face hub, could not get {name!r} "
            f"({reason}){nearest_name(name)}"
        ) from error


def _doubled(name: str) -> list[str] | None:
    """The files that hold the same weights as others of the model."""
    from huggingface_hub import HfApi

    try:
        # unlike a list of files, it is asked for once only where there is no network
        written = HfApi().model_info(name, timeout=10).siblings or []
    except Exception:
        # the cache may still hold the model
        written = []
    return ["pytorch_model*"] if any(file.rfilename.endswith(".safetensors") for file in written) else None


def _published() -> list[str]:
    """The names of all published models."""
    return [known.name for family in FAMILIES for known in family.known]


def nearest_name(name: str) -> str:
    """The end of a message about a name that is no model's: a name like it, and where all names are."""
    # also by the part behind the organisation, which is what people remember
    names = {known.lower(): known for known in _published()}
    names |= {known.rpartition("/")[2]: full for known, full in list(names.items())}
    alike = get_close_matches(name.lower(), names, n=1)
    return f"{f'; did you mean {names[alike[0]]}?' if alike else ''}; `longlens models` lists the models by name"
