"""Write the folder of a model, and one in the form of the folder that was read, so that what reads the one reads the
other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from longlens.io.results import write_whole
from longlens.models.families.written import WrittenForm
from longlens.models.language_model import MaskedLM

WEIGHTS = "model.safetensors"
# entries of a config.json that name the dtype of its weights, in transformers 4 and 5
_DTYPES = ("torch_dtype", "dtype")


def write_as_read(model: MaskedLM, form: WrittenForm, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `model` to `folder` in `form`: one file of weights, under the names of the files that it was read from, and
    copies of the other files. `dtype`: of the weights; None: the model's.

    What means nothing to a masked language model is not written, such as the decoder of a T5 or a classifier. The
    vector that BERT adds to every token is part of its positions here, and is written so, with token types of zero.
    """
    config = _with_dtype(form.files["config.json"], dtype or model.dtype)
    write_folder(folder, {**form.files, "config.json": config}, _tensors(model, form, dtype))


def write_folder(folder: Path, files: Mapping[str, bytes], tensors: dict[str, Tensor]) -> None:
    """Write a model's folder, with its weights in one file. Each file is replaced in one step, and never through a
    link, so that a model may be written over another."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)
    # written as an ordinary file, so that it gets the usual permissions
    write_whole(folder / WEIGHTS, save_tensors(tensors, metadata={"format": "pt"}))
    # the index of a model in several files, which would be read in place of the one file
    (folder / f"{WEIGHTS}.index.json").unlink(missing_ok=True)


def _tensors(model: MaskedLM, form: WrittenForm, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors by their names in the file."""
    names, config, ours = form.names, form.config, model.state_dict()
    here: dict[str, Tensor] = {}
    table = names.table(config, predicts=model.predicts, contacts=model.contact_head is not None)
    for name, sources in table.items():
        if name in ours:
            parts = ours[name].to(device="cpu", dtype=dtype or ours[name].dtype).chunk(len(sources))
            here |= dict(zip(sources, parts, strict=True))
    if names.restore is not None:
        here = {name: names.restore(name, tensor, config) for name, tensor in here.items()}
    if names.token_type is not None and names.token_type in form.originals:
        shape = form.originals[names.token_type][1]
        here[names.token_type] = torch.zeros(shape, dtype=here[names.embedding].dtype)
    if config.rotary:
        frequencies = ours["encoder.rotary.frequencies"].cpu()
        here |= {name: frequencies for name in names.frequency_names(config) if name in form.originals}
    here |= {copy: here[original] for copy, original in names.tied if copy in form.originals and original in here}
    # a file holds no two tensors in one memory
    return {form.originals.get(name, (name,))[0]: tensor.clone().contiguous() for name, tensor in here.items()}


def _with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """A config.json that names this dtype, if it names one."""
    entries = json.loads(config)
    named = [entry for entry in _DTYPES if entry in entries]
    if not named:
        return config
    entries |= dict.fromkeys(named, str(dtype).removeprefix("torch."))
    return (json.dumps(entries, indent=1) + "\n").encode()
