"""Models that are on this machine: inside the package, in a package of their own, in the cache of the Hugging Face hub.

The layout of the cache is the hub's: `models--OWNER--NAME/snapshots/COMMIT/`, with the commit of the default branch in
`refs/main` (https://huggingface.co/docs/huggingface_hub/guides/manage-cache). Nothing is fetched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from longlens.diagnosis.packages import installed_version

# weights in the formats that longlens reads
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class LocalModel:
    """A model by the name that `--model` takes.

    `served` says how: "load" (`longlens.load` and every command), "attach" (as a model of transformers), or "" where
    its files are incomplete. `note` says why, in a few words; `bytes` are those of its weights.
    """

    name: str
    served: str
    note: str
    bytes: int


def find_models() -> tuple[LocalModel, ...]:
    """The models that need no download."""
    found = [LocalModel("tiny", "load", "inside this package", 0)]
    if number := installed_version("antiberty"):
        found.append(LocalModel("antiberty", "load", f"package antiberty {number}", 0))
    return (*found, *find_cached(hub_cache()))


def hub_cache() -> Path:
    """The folder of the hub's cache, by the environment variables that the hub's own client reads."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return base.expanduser() / "hub"


def find_cached(cache: Path) -> list[LocalModel]:
    """The models of a cache, by name. A folder that cannot be read holds none."""
    try:
        folders = sorted(cache.glob("models--*"))
    except OSError:
        return []
    return [_inspect(folder.name.removeprefix("models--").replace("--", "/"), folder) for folder in folders]


def _inspect(name: str, folder: Path) -> LocalModel:
    snapshot = _snapshot(folder)
    if snapshot is None or not (snapshot / "config.json").is_file():
        return LocalModel(name, "", "no configuration", 0)
    size = sum(file.stat().st_size for pattern in WEIGHTS for file in snapshot.glob(pattern) if file.is_file())
    if not size:
        return LocalModel(name, "", "no weights", 0)
    return LocalModel(name, *_served(snapshot / "config.json", name), size)


def _snapshot(folder: Path) -> Path | None:
    """The folder of the default branch, or the newest where that is not recorded."""
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    # a name with a folder in it would lead elsewhere
    if commit and Path(commit).name == commit and (folder / "snapshots" / commit).is_dir():
        return folder / "snapshots" / commit
    there = [entry for entry in folder.glob("snapshots/*") if entry.is_dir()]
    return max(there, key=lambda entry: entry.stat().st_mtime, default=None)


def _served(config: Path, name: str) -> tuple[str, str]:
    """How a model with this configuration is used, and its architecture or what is wrong with it."""
    from longlens.errors import CheckpointError
    from longlens.models.checkpoints.configuration import encoder_config, read_json

    try:
        entries = read_json(config)
    except CheckpointError:
        return "", "a configuration that cannot be read"
    kind = str(entries.get("model_type", "unknown"))
    try:
        encoder_config(entries, Path(name))
    except CheckpointError:
        return "attach", f"architecture {kind}"
    return "load", f"architecture {kind}"
