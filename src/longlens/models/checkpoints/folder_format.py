"""Folders in transformers' format: config.json, vocab.txt, and weights as safetensors or `.bin`, also in shards."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from longlens.errors import CheckpointError
from longlens.io.alphabet import ESM, Alphabet
from longlens.models.checkpoints.checkpoint import Checkpoint
from longlens.models.checkpoints.configuration import architecture, class_names, encoder_config, read_json
from longlens.models.checkpoints.names import TRANSFORMERS_BERT, TRANSFORMERS_ESM, TensorNames
from longlens.models.checkpoints.tensors import CheckpointTensors, SafetensorsFile, TensorFile, TorchFile

_FORMATS: tuple[tuple[str, type[SafetensorsFile] | type[TorchFile]], ...] = (
    ("model.safetensors", SafetensorsFile),
    ("pytorch_model.bin", TorchFile),
)


def read_folder(folder: Path) -> Checkpoint:
    """Read ESM-2 or BERT, with any head or without one.

    Raises `CheckpointError` for another architecture, and for files that are missing or broken.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"expected {folder} to hold config.json, found none")
    entries = read_json(config_file)
    config = encoder_config(entries, folder)
    esm = architecture(entries, folder) == "esm"
    names = TRANSFORMERS_ESM if esm else TRANSFORMERS_BERT
    alphabet = ESM if esm else bert_alphabet(folder / "vocab.txt")
    if len(alphabet) != config.vocabulary:
        raise CheckpointError(f"{folder}: expected {config.vocabulary} tokens in its vocabulary, got {len(alphabet)}")
    predicts = any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in class_names(entries))
    return Checkpoint(str(folder), read_tensors(folder, names), names, config, alphabet, predicts)


def read_tensors(folder: Path, names: TensorNames) -> CheckpointTensors:
    """The tensors of a folder's files, under the names that they have in a model with a head."""
    files = _open_files(folder)
    bare = names.embedding.removeprefix(names.prefix)
    alone = any(bare in file.infos for file in files)

    def rename(name: str) -> str:
        # names of LayerNorm's parameters in the oldest checkpoints
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        return f"{names.prefix}{name}" if alone and name.startswith(_ENCODER_PARTS) else name

    return CheckpointTensors(files, rename)


# the names in a checkpoint of the encoder alone have no prefix
_ENCODER_PARTS = ("embeddings.", "encoder.", "rotary_embeddings.", "contact_head.", "pooler.")


def bert_alphabet(vocabulary: Path) -> Alphabet:
    """The tokens of a vocab.txt. Raises `CheckpointError` if special tokens are missing."""
    if not vocabulary.is_file():
        raise CheckpointError(f"expected a vocabulary at {vocabulary}, found none")
    try:
        tokens = tuple(vocabulary.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{vocabulary}: expected tokens in UTF-8, one a line ({error}); fetch it again") from None
    place = {token: number for number, token in enumerate(tokens)}
    special = ("[CLS]", "[SEP]", "[MASK]", "[UNK]", "[PAD]")
    missing = [token for token in special if token not in place]
    if missing:
        raise CheckpointError(f"{vocabulary}: expected the tokens {', '.join(special)}, got none of {missing}")
    start, end, mask, unknown, pad = (place[token] for token in special)
    return Alphabet(tokens, start=start, end=end, mask=mask, unknown=unknown, pad=pad)


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
