"""AntiBERTy's weights and vocabulary, read from its installed package without importing its code."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from longlens.errors import CheckpointError
from longlens.models.checkpoints.checkpoint import Checkpoint
from longlens.models.checkpoints.configuration import encoder_config, read_json
from longlens.models.checkpoints.folder_format import descriptions, read_tensors
from longlens.models.families.bert import TRANSFORMERS_BERT, bert_alphabet

_INSTALL = "pip install antiberty==0.1.3 --no-deps"


def read_antiberty() -> Checkpoint:
    """The model of the installed package. Raises `CheckpointError` if it is missing or its version has no weights."""
    spec = importlib.util.find_spec("antiberty")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"expected the package antiberty, found none; {_INSTALL}")
    folder = Path(next(iter(spec.submodule_search_locations))) / "trained_models"
    weights = folder / "AntiBERTy_md_smooth"
    if not (weights / "config.json").is_file():
        raise CheckpointError(
            f"expected the package antiberty with its weights inside, as version 0.1.3 has them, got {_version()} in "
            f"{folder.parent}, which has none; {_INSTALL}"
        )
    config = encoder_config(read_json(weights / "config.json"), weights)
    alphabet = bert_alphabet(folder / "vocab.txt")
    tensors, names = read_tensors(weights, (TRANSFORMERS_BERT,))
    files = (*descriptions(weights), folder / "vocab.txt")
    return Checkpoint("antiberty", tensors, names, config, alphabet, files=files)


def _version() -> str:
    try:
        return f"version {version('antiberty')}"
    except PackageNotFoundError:
        return "another package of that name"
