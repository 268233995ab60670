"""Folders in transformers' format: config.json, vocab.txt, and weights as safetensors or `.bin`, also in shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PureWindowsPath

from longlens.errors import CheckpointError
from longlens.models.checkpoints.checkpoint import Checkpoint
from longlens.models.checkpoints.configuration import encoder_config, read_json
from longlens.models.checkpoints.tensors import CheckpointTensors, SafetensorsFile, TensorFile, TorchFile
from longlens.models.families.names import TensorNames
from longlens.models.families.pieces import FILES as TOKENIZER_FILES
from longlens.models.families.registry import class_names, family_of

_FORMATS: tuple[tuple[str, type[SafetensorsFile] | type[TorchFile]], ...] = (
    ("model.safetensors", SafetensorsFile),
    ("pytorch_model.bin", TorchFile),
)

_DESCRIPTIONS = ("config.json", "vocab.txt", *TOKENIZER_FILES, "special_tokens_map.json")


def read_folder(folder: Path) -> Checkpoint:
    """Read a model of any family (`longlens.models.families`), with any head or without one.

    Raises `CheckpointError` for another architecture, and for files that are missing or broken.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"expected {folder} to hold config.json, found none")
    entries = read_json(config_file)
    config = encoder_config(entries, folder)
    family = family_of(entries, str(folder))
    alphabet = family.alphabet(folder, config)
    if len(alphabet) != config.vocabulary:
        raise CheckpointError(f"{folder}: expected {config.vocabulary} tokens in its vocabulary, got {len(alphabet)}")
    predicts = any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in class_names(entries))
    tensors, names = read_tensors(folder, family.layouts)
    predicts = predicts and config.head is not None
    return Checkpoint(str(folder), tensors, names, config, alphabet, predicts, family.notice, descriptions(folder))


def descriptions(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that describe its model and tokens; nothing else that lies there."""
    return tuple(folder / name for name in _DESCRIPTIONS if (folder / name).is_file())


def read_tensors(folder: Path, layouts: Sequence[TensorNames]) -> tuple[CheckpointTensors, TensorNames]:
    """The tensors of a folder's files, under the names that they have in a model with a head, and the layout to which
    these belong: the first that has the embedding's name, or the first of all."""
    files = _open_files(folder)
    for names in layouts:
        written = {names.name(name) for file in files for name in file.infos}
        alone = names.embedding.removeprefix(names.prefix) in written and bool(names.prefix)
        if alone or names.embedding in written:
            return CheckpointTensors(files, partial(_renamed, names, alone)), names
    return CheckpointTensors(files, partial(_renamed, layouts[0], False)), layouts[0]


def _renamed(names: TensorNames, alone: bool, written: str) -> str | None:
    """`alone`: a checkpoint of the encoder without a head, whose names lack the prefix."""
    name = names.name(written)
    return f"{names.prefix}{name}" if name is not None and alone and name.startswith(names.bare) else name


def _open_files(folder: Path) -> list[TensorFile]:
    for stem, kind in _FORMATS:
        index, single = folder / f"{stem}.index.json", folder / stem
        if index.is_file():
            return [kind(folder / shard) for shard in _shards(index)]
        if single.is_file():
            return [kind(single)]
    raise CheckpointError(f"expected {folder} to hold model.safetensors or pytorch_model.bin, found neither")


def _shards(index: Path) -> list[str]:
    """The files that an index names, which must be in the folder of the index."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(file, str) for file in entries.values()):
        raise CheckpointError(f"{index}: expected weight_map to map tensors to files; fetch it again")
    shards = sorted(set(entries.values()))
    for shard in shards:
        # a name with a folder, a drive or `..` leads to another folder, on any system
        if PureWindowsPath(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: expected names of files beside it, got {shard!r:.80}")
        if not (index.parent / shard).is_file():
            raise CheckpointError(
                f"expected {index.parent / shard}, which the index names, found none; fetch the folder again"
            )
    return shards
