"""The model whose vectors a fine-tuned head takes: how it is described, found again, and recognised in any dtype."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from longlens.errors import CheckpointError, InputError
from longlens.finetuning.saved import MODEL, HeadInfo
from longlens.jobs.job_key import ModelInfo
from longlens.jobs.limits import load_model
from longlens.models.language_model import MaskedLM
from longlens.models.pretrained import DTYPES, choose_device, choose_dtype


def weights_sha256(model: MaskedLM, dtype: torch.dtype) -> str:
    """The SHA-256 of a model's weights as they are in `dtype`, with their names and shapes, a tensor at a time.

    It is that of the same model loaded in `dtype`, where `dtype` holds fewer numbers than the model's own.
    """
    digest, own = hashlib.sha256(), model.dtype
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in sorted(model.state_dict().items()):
        # what no parameter holds, such as a rope's frequencies, is float32 in every model
        kept = tensor.to(dtype) if name in weights and tensor.dtype == own else tensor
        digest.update(f"{name} {tuple(kept.shape)} {kept.dtype}".encode())
        digest.update(kept.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dtypes(model: MaskedLM) -> list[str]:
    """The model's own dtype, and those to which its weights can be rounded as loading rounds them."""
    half = [name for name, dtype in DTYPES.items() if dtype == model.dtype and dtype.itemsize < 4]
    return half or list(DTYPES)


def described_base(model: ModelInfo) -> dict[str, Any]:
    """`source` of a model, and `sha256` of its weights by dtype: its own, and narrower ones."""
    loaded = model.language_model
    hashes = {name: weights_sha256(loaded, DTYPES[name]) for name in _dtypes(loaded)}
    return {"source": model.described()["source"], "sha256": hashes}


def load_base(
    folder: Path, info: HeadInfo, base: str | Path | MaskedLM | None, dtype: str, device: str, max_memory: str | None
) -> MaskedLM:
    """The model of a fine-tuning, whose weights are compared with those that were fine-tuned.

    Raises `CheckpointError` for a device or dtype that there is not, a model that is no longer there, other weights,
    and a dtype in which the weights cannot be compared.
    """
    choose_dtype(dtype, choose_device(device))
    if not info.base:
        if base is not None:
            raise InputError(f"{folder} holds its own model; leave out the base")
        return load_model(folder / MODEL, dtype, device, max_memory)
    source = info.base["source"]
    try:
        loaded = load_model(source if base is None else base, dtype, device, max_memory)
    except CheckpointError as error:
        if base is not None or Path(source).exists():
            raise
        raise CheckpointError(
            f"{folder}: its head takes the vectors of {source}, which cannot be loaded ({error}); say where the model "
            "is now with --base"
        ) from None
    _refuse_others(folder, info.base, loaded)
    return loaded


def _refuse_others(folder: Path, base: dict[str, Any], loaded: MaskedLM) -> None:
    """Raise `CheckpointError` unless the weights are those that were fine-tuned."""
    known = base["sha256"]
    if isinstance(known, str):
        raise CheckpointError(f"{folder}: an earlier longlens made this head; run `longlens finetune` again")
    shared = next((name for name in _dtypes(loaded) if name in known), None)
    if shared is None:
        possible = " or ".join(dict.fromkeys(["float32", *known]))
        raise CheckpointError(
            f"{folder}: expected dtype {possible}, in which the weights can be compared with those that were "
            f"fine-tuned, got {str(loaded.dtype).split('.')[-1]}"
        )
    found = weights_sha256(loaded, DTYPES[shared])
    if found != known[shared]:
        raise CheckpointError(
            f"{folder}: expected the weights that were fine-tuned ({base['source']}, SHA-256 {known[shared][:12]}... "
            f"in {shared}), got others ({loaded.source}, {found[:12]}...)"
        )
