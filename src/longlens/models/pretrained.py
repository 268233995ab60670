"""Trained models: `load("tiny")`, a hub name, a folder, a fair-esm file, an installed package; and `save`.

The formats are in `longlens.models.checkpoints`.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from longlens.errors import CheckpointError, LonglensWarning
from longlens.models.checkpoints.antiberty import read_antiberty
from longlens.models.checkpoints.build import build
from longlens.models.checkpoints.checkpoint import Checkpoint
from longlens.models.checkpoints.esmc_file import read_esmc_file
from longlens.models.checkpoints.fair_esm import read_fair_esm
from longlens.models.checkpoints.folder_format import read_folder
from longlens.models.checkpoints.hub import fetch, fetch_config, hub_takes_chains
from longlens.models.checkpoints.writing import write_as_read, write_folder
from longlens.models.encoder import EncoderConfig
from longlens.models.families.esm2 import TRANSFORMERS_ESM
from longlens.models.families.t5 import FLOAT16
from longlens.models.families.written import WrittenForm
from longlens.models.language_model import MaskedLM
from longlens.models.parts.norm import Norm
from longlens.models.parts.positions import RelativePositions

TINY = Path(__file__).parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(name_or_path: str | Path = "tiny", *, dtype: str = "auto", device: str = "auto") -> MaskedLM:
    """A protein language model, ready to run.

    Its parameters are frozen: `load(...).requires_grad_(True)` gives a model to train. Weights are read one tensor at a
    time, so that loading takes the memory of the model in `dtype` and of its largest tensor.

    Checkpoints without a language model's head (`EsmModel`, `EsmForSequenceClassification`,
    `EsmForTokenClassification`, with and without the `esm.` prefix; BERT likewise) give vectors and attention; asking
    such a model for logits raises `InputError`. Classifiers that were fine-tuned on top are ignored, and so are the
    decoder and head of a T5.

    Args:
        name_or_path: "tiny" (inside this package); "antiberty" (from the installed package of that name); a folder in
            transformers' format (safetensors or .bin) of a family that `longlens models` lists; a fair-esm `.pt` file
            of ESM-1b, ESM-1v or ESM-2, with its `-contact-regression.pt` beside it if there is one; a `.pth` file of
            ESM-C; otherwise the name of a model on the Hugging Face hub.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU that has it, float32 otherwise.
        device: "cpu", "cuda", ..., or "auto": a GPU if there is one.

    Warns by `LonglensWarning` of a licence that restricts the use of the weights (Ankh).

    Raises:
        CheckpointError: no such model, another architecture, broken files, float16 for a T5, or weights that are not
            those of the configuration: each tensor that is missing, extra or of another shape is named.
    """
    chosen = choose_device(device)
    precision = choose_dtype(dtype, chosen)
    checkpoint = _read(name_or_path)
    check_dtype(checkpoint.config, precision, checkpoint.source)
    if checkpoint.notice:
        warnings.warn(f"{checkpoint.source}: {checkpoint.notice}", LonglensWarning, stacklevel=2)
    return build(checkpoint, precision, chosen)


def read_config(name_or_path: str | Path) -> EncoderConfig:
    """The shape of a model, without its weights, which are not fetched from a hub. Arguments and errors: `load`."""
    return fetch_config(str(name_or_path)) if _of_hub(name_or_path) else _read(name_or_path).config


def takes_chains(name_or_path: str | Path) -> bool:
    """Whether a model takes complexes of several chains, without its weights. Arguments and errors: `load`."""
    if _of_hub(name_or_path):
        return hub_takes_chains(str(name_or_path))
    return _read(name_or_path).alphabet.chain_break is not None


def choose_device(device: str) -> torch.device:
    """The device of a name. Raises `CheckpointError` if there is no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"expected an available device, such as cpu or cuda, got {device!r}: {error}") from None


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of a name on a device."""
    if dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if half else torch.float32
    if dtype not in DTYPES:
        raise CheckpointError(f"expected dtype auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def check_dtype(config: EncoderConfig, dtype: torch.dtype, source: str) -> None:
    """Raise `CheckpointError` for a dtype in which a model of this configuration would give no numbers."""
    if dtype == torch.float16 and isinstance(config.positions, RelativePositions):
        raise CheckpointError(f"{source}: expected another dtype than float16: {FLOAT16}")


def refuse_unsavable(model: MaskedLM) -> None:
    """Raise `CheckpointError` for a model that `save` cannot write."""
    if _form(model) is not None:
        return
    config = model.config
    esm2 = EncoderConfig(
        config.vocabulary, config.layers, config.width, config.heads, config.feed_forward,
        norm=Norm(eps=config.norm.eps), token_dropout=config.token_dropout, mask_token=config.mask_token,
        head=config.head,
    )  # fmt: skip
    if config != esm2:
        raise CheckpointError(
            f"expected a model that can be written, got {model.source}: of models that were not read from a folder in "
            "transformers' format, only those of ESM-2's architecture can be; give the model's folder"
        )
    if not model.predicts:
        raise CheckpointError(f"expected a model with a language model's head, got {model.source}, which has none")


def save(model: MaskedLM, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model as a folder in transformers' format: config.json, model.safetensors, and its vocabulary.

    A model that was read from such a folder is written as that was (`longlens.models.checkpoints.writing`), any other
    of ESM-2's architecture as `EsmForMaskedLM`. `dtype`: of the weights; None: the model's.

    Raises:
        CheckpointError: a model of another architecture that was not read from a folder.
    """
    refuse_unsavable(model)
    form, config = _form(model), model.config
    if form is not None:
        write_as_read(model, form, folder, dtype)
        return
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
        "layer_norm_eps": config.norm.eps, "token_dropout": config.token_dropout, "mask_token_id": config.mask_token,
        "pad_token_id": model.alphabet.pad, "position_embedding_type": "rotary", "emb_layer_norm_before": False,
        "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "max_position_embeddings": 1026,
        "tie_word_embeddings": True,
    }  # fmt: skip
    files = {
        "config.json": f"{json.dumps(written, indent=1)}\n".encode(),
        "vocab.txt": "".join(f"{token}\n" for token in model.alphabet.tokens).encode(),
    }
    write_folder(folder, files, theirs)


def _form(model: MaskedLM) -> WrittenForm | None:
    """The form in which a model was read, if its configuration is still that of the files."""
    return model.written if model.written is not None and model.written.config == model.config else None


def _of_hub(name_or_path: str | Path) -> bool:
    """Whether a name is looked for on the hub: nothing in this package or on the disk is meant by it."""
    path = Path(name_or_path)
    local = path.exists() or path.suffix in (".pt", ".pth") or str(name_or_path).startswith((".", "/", "~"))
    return not local and name_or_path not in ("tiny", "antiberty")


def _read(name_or_path: str | Path) -> Checkpoint:
    path = Path(name_or_path)
    if name_or_path == "tiny":
        return replace(read_folder(TINY), source="tiny")
    if name_or_path == "antiberty":
        return read_antiberty()
    if path.is_dir():
        return read_folder(path)
    if path.is_file() and path.suffix in (".safetensors", ".bin"):
        raise CheckpointError(f"{path}: expected a model's folder; give {path.parent}, which holds its config.json too")
    if path.is_file():
        return read_esmc_file(path) if path.suffix == ".pth" else read_fair_esm(path)
    if _of_hub(name_or_path):
        return replace(read_folder(fetch(str(name_or_path))), source=str(name_or_path))
    raise CheckpointError(f"expected a model's folder or fair-esm file, found nothing at {path}")
